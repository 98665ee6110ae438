"""The state of a training between two steps, as it stands in a checkpoint's state.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainingState:
    """How far a training has come.

    Attributes:
        identity: sha256 over everything that determines the training.
        micro_batch_tokens: tokens per pass, about.
        step: optimizer steps done.
        base_eval_loss: validation loss before the first step, in nats per response token; infinite until it is known.
        best_eval_loss: lowest validation loss so far, in nats per response token; infinite until one is known.
        best_step: step of that validation.
        journal_lines: lines of the journal that belong to the steps done.
    """

    identity: str
    micro_batch_tokens: int
    step: int = 0
    base_eval_loss: float = math.inf
    best_eval_loss: float = math.inf
    best_step: int = 0
    journal_lines: int = 0

    def to_json(self) -> dict[str, Any]:
        """The content of state.json; ``write_checkpoint`` adds the checksums of the checkpoint's files."""
        return {
            "identity": self.identity,
            "base_eval_loss": self.base_eval_loss,
            "best_eval_loss": self.best_eval_loss,
            "best_step": self.best_step,
            "journal_lines": self.journal_lines,
            "micro_batch_tokens": self.micro_batch_tokens,
            "step": self.step,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], micro_batch_tokens: int) -> TrainingState:
        """The state that a checkpoint recorded.

        Args:
            record: the content of state.json.
            micro_batch_tokens: tokens per pass from now on.
        """
        return cls(
            identity=record["identity"],
            micro_batch_tokens=micro_batch_tokens,
            step=int(record["step"]),
            base_eval_loss=record["base_eval_loss"],
            best_eval_loss=record["best_eval_loss"],
            best_step=record["best_step"],
            journal_lines=record["journal_lines"],
        )
