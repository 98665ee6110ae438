"""The state of a training between two steps, as it stands in a checkpoint's state.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[int, Field(ge=0)]


class CheckpointFiles(BaseModel):
    """The part of a state.json that verifies the other files of a checkpoint."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: Number
    files: dict[str, str]


class CheckpointRecord(BaseModel):
    """A state.json from which a training can be resumed. Fields are those of ``TrainingState``."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    identity: str
    step: Number
    base_eval_loss: float
    best_eval_loss: float
    best_step: Number
    journal_lines: Annotated[int, Field(ge=1)]
    micro_batch_tokens: Annotated[int | None, Field(ge=1)] = None
    world: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_step > self.step:
            raise ValueError(f"best_step {self.best_step} is after step {self.step}")
        if self.best_eval_loss > self.base_eval_loss or self.journal_lines <= self.step:
            raise ValueError("best_eval_loss and journal_lines do not fit base_eval_loss and step")
        return self

    @property
    def eval_losses(self) -> dict[int, float]:
        """The validation losses by step that are known from it."""
        return {0: self.base_eval_loss, self.best_step: self.best_eval_loss}


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
        world: number of processes that train together.
    """

    identity: str
    micro_batch_tokens: int
    step: int = 0
    base_eval_loss: float = math.inf
    best_eval_loss: float = math.inf
    best_step: int = 0
    journal_lines: int = 0
    world: int = 1

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
            "world": self.world,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], micro_batch_tokens: int, world: int = 1) -> TrainingState:
        """The state that a checkpoint recorded.

        Args:
            record: the content of state.json.
            micro_batch_tokens: tokens per pass from now on.
            world: number of processes from now on.

        Raises:
            ValueError: the record is damaged.
        """
        found = CheckpointRecord.model_validate(record)
        return cls(
            identity=found.identity,
            micro_batch_tokens=micro_batch_tokens,
            step=found.step,
            base_eval_loss=found.base_eval_loss,
            best_eval_loss=found.best_eval_loss,
            best_step=found.best_step,
            journal_lines=found.journal_lines,
            world=world,
        )
