"""Writing a training's checkpoints while the training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from model.engine.adamw import MOMENTS, AdamW
from model.engine.checkpoint import Snapshot, prune_checkpoints, take_snapshot, write_checkpoint
from model.net.gpt import GPTModel

_SECONDS_BETWEEN = 15.0  # between two checkpoints that are written in the background: as much is lost by a kill
_LARGE = 4 * 10**9  # bytes of a snapshot

_Training = tuple[GPTModel, AdamW, Mapping[str, Tensor] | None]  # as for take_snapshot


@dataclass(frozen=True)
class _Waiting:
    """A checkpoint that is to be written.

    Attributes:
        take: copies its tensors to main memory, if they are not there already.
        step: optimizer steps done.
        state: content of state.json.
        keep: steps whose checkpoints are kept when it is written.
    """

    take: Callable[[], Snapshot]
    step: int
    state: dict[str, Any]
    keep: set[int]


class CheckpointWriter:
    """Context manager that writes a training's checkpoints while the training goes on.

    Writing a checkpoint takes about a second, and a small model reaches its next validation sooner. So one is written
    every ``_SECONDS_BETWEEN`` at most, and the last one in the end. One that waits is dropped if a newer one makes it
    superfluous. A training that is killed resumes from the newest checkpoint on disk, and no checkpoint is deleted
    before a newer one is written. An error of a write is raised by a later ``save`` or ``wait``, or at the end of the
    context, which waits for all checkpoints unless ``close`` was called.

    Args:
        directory: directory of the training.
        in_background: write in a thread. The default is to do so only for a model on a GPU: on a CPU the copy
            would take memory that the training needs. Without it, each checkpoint is written at once.
        further: as for ``take_snapshot``.
    """

    def __init__(
        self,
        directory: Path,
        model: GPTModel,
        optimizer: AdamW,
        in_background: bool | None = None,
        further: Mapping[str, Tensor] | None = None,
    ):
        self.directory = directory
        self._training: _Training | None = (model, optimizer, further)
        self.in_background = model.wte.weight.is_cuda if in_background is None else in_background
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: list[_Waiting] = []
        self._is_writing = self._is_urgent = self._is_closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Any], keep: Collection[int]) -> None:
        """Write a checkpoint of the current state, then delete the checkpoints of all steps that ``keep`` lacks.

        Raises:
            OSError: this checkpoint, or one before it, could not be written.
        """
        if not self.in_background:
            self._write(_Waiting(lambda: take_snapshot(*self._tensors()), step, state, set(keep)))
            return
        if self._snapshot_bytes() > _LARGE:
            self.wait()  # else several copies of it would take main memory
        take = self._copy()
        with self._changed:
            self._raise_error()
            self._waiting = [each for each in self._waiting if each.step in keep]
            self._waiting.append(_Waiting(take, step, state, set(keep)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint")
                self._thread.start()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when the last checkpoint is on disk.

        Raises:
            OSError: a checkpoint could not be written.
        """
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._waiting or self._is_writing))
            self._is_urgent = False
            self._raise_error()

    def close(self) -> Callable[[], None]:
        """Take no further checkpoint, and write those that wait at once. The training's tensors may change now.

        Returns:
            What waits until all checkpoints are on disk. It raises OSError if one could not be written.
        """
        self._close()
        return self._finish

    def _close(self) -> None:
        self._training = None  # frees the optimizer's memory while the last checkpoint is written
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._raise_error()

    def _tensors(self) -> _Training:
        assert self._training is not None, "the writer is closed"
        return self._training

    def _copy(self) -> Callable[[], Snapshot]:
        """Copy the present tensors: within a GPU if it has room for that, which takes a millisecond."""
        device = self._tensors()[0].wte.weight.device
        if device.type == "cuda" and 10 * self._snapshot_bytes() < torch.cuda.mem_get_info(device)[0]:
            copied = take_snapshot(*self._tensors(), copy=True, device=device)
            return partial(_bring_to_host, copied, torch.cuda.current_stream(device).record_event())
        snapshot = take_snapshot(*self._tensors(), copy=True)
        return lambda: snapshot

    def _snapshot_bytes(self) -> int:
        return (1 + len(MOMENTS)) * sum(p.nbytes for p in self._tensors()[0].parameters() if p.requires_grad)

    def _work(self) -> None:
        """Write what waits, until the context ends."""
        due = time.monotonic() + _SECONDS_BETWEEN
        while job := self._next(due):
            due = time.monotonic() + _SECONDS_BETWEEN
            try:
                self._write(job)
                error = None
            except BaseException as caught:
                error = caught
            del job  # its tensors
            with self._changed:
                self._is_writing, self._error = False, self._error or error
                self._changed.notify_all()

    def _next(self, due: float) -> _Waiting | None:
        """Wait for the next checkpoint, and until it is due; None when the context has ended."""
        with self._changed:
            while not (self._waiting and (self._is_urgent or self._is_closed or time.monotonic() >= due)):
                if self._is_closed:
                    return None
                self._changed.wait(max(0.0, due - time.monotonic()) if self._waiting else None)
            self._is_writing = True
            return self._waiting.pop(0)

    def _write(self, job: _Waiting) -> None:
        write_checkpoint(self.directory, job.take(), job.step, job.state)
        prune_checkpoints(self.directory, job.keep)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None and self._is_closed:  # the caller of close() waits
            return
        self._close()
        if self._thread is not None:
            self._thread.join()  # also after a failed training: a retry resumes from what is written
        if kind is None:
            self._raise_error()


def _bring_to_host(snapshot: Snapshot, copied: torch.cuda.Event) -> Snapshot:
    """Copy a snapshot from a GPU, beside the training's work there.

    Args:
        copied: when its tensors are complete.
    """
    stream = torch.cuda.Stream(next(iter(snapshot.model.values())).device)
    stream.wait_event(copied)
    with torch.cuda.stream(stream):
        parts = [{name: t.cpu() for name, t in part.items()} for part in (snapshot.model, snapshot.trainer)]
    return Snapshot(*parts)
