"""The files of a training, its journal and its checkpoints: rank 0 reads and writes them for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from model.engine.adamw import AdamW
from model.engine.checkpoint import FoundCheckpoint, load_checkpoint
from model.engine.digests import check_equal
from model.engine.journal import MetricsJournal
from model.engine.ranks import Ranks
from model.engine.saving import CheckpointWriter
from model.net.gpt import GPTModel


class TrainingFiles:
    """Context manager that keeps the journal and the checkpoints of a training. All ranks call it alike.

    Args:
        directory: directory of the training; only rank 0 needs it.
        journal: name of the journal in it.
        model: that trains.
        optimizer: of the model.
        further: tensors of the training's state by name, besides those of model and optimizer.
        ranks: processes that train together.
    """

    def __init__(
        self,
        directory: Path,
        journal: str,
        model: GPTModel,
        optimizer: AdamW,
        further: Mapping[str, Tensor],
        ranks: Ranks,
    ):
        self.model, self.optimizer, self.further, self.ranks = model, optimizer, further, ranks
        self.journal: MetricsJournal | None = None
        self.writer: CheckpointWriter | None = None
        if ranks.leads:
            directory.mkdir(parents=True, exist_ok=True)
            self.journal = MetricsJournal(directory / journal)
            self.writer = CheckpointWriter(directory, model, optimizer, further=further)

    def restore(self, found: FoundCheckpoint | None, journal_lines: int) -> None:
        """Load a checkpoint on all ranks, and cut the journal back to it.

        Args:
            found: the checkpoint; None for a fresh start.
            journal_lines: lines that the journal had then.

        Raises:
            ValueError: as ``load_checkpoint``; on rank 0.
            RanksDifferError: the ranks do not start from the same parameters, frozen ones included.
        """
        if found and self.ranks.leads:
            load_checkpoint(found.path, self.model, self.optimizer, self.further)
        if self.journal is not None:
            self.journal.truncate(journal_lines)
        if found and self.ranks.world > 1:
            self._send_state()
        check_equal(self.ranks, dict(self.model.named_parameters()), "at the start")

    def _send_state(self) -> None:
        """Overwrite the state of all ranks by that of rank 0: another host need not see the checkpoint."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        tensors = [*(p.data for p in trained), *self.further.values()]
        if self.ranks.from_first(lambda: bool(self.optimizer.state)):
            for parameter in trained:
                state = self.optimizer.state_of(parameter)
                tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
        self.ranks.broadcast(tensors)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line to the journal.

        Raises:
            DiskFullError: the disk is full; on rank 0.
        """
        if self.journal is not None:
            self.journal.append(step, metrics)

    @property
    def journal_lines(self) -> int:
        """Lines of the journal; 0 on all ranks but the first."""
        return 0 if self.journal is None else self.journal.lines

    def save(self, step: int, state: dict[str, Any], keep: Collection[int]) -> None:
        """Write a checkpoint as ``CheckpointWriter.save``.

        Raises:
            OSError: this checkpoint, or the one before it, could not be written; on rank 0.
        """
        if self.writer is not None:
            self.writer.save(step, state, keep)

    def wait(self) -> None:
        """Return when the last checkpoint is on disk; only rank 0 knows, and waits.

        Raises:
            OSError: the checkpoint could not be written; on rank 0.
        """
        if self.writer is not None:
            self.writer.wait()

    def close(self) -> Callable[[], None]:
        """End with the checkpoints that were saved so far, as ``CheckpointWriter.close``."""
        return (lambda: None) if self.writer is None else self.writer.close()

    def __enter__(self) -> TrainingFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.__exit__(kind, error, at)
