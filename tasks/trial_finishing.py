"""The stages of a trial: its end is done while the next trial trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent import futures
from types import TracebackType
from typing import Any

from ops.threads import in_daemon_thread

_SECONDS = 10.0  # that an interrupted sweep waits for the end of the trial before


class Stages:
    """Where a trial's time goes, in seconds: before its first step, in its steps, and after them."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.first_step = self.trained = 0.0

    def end_step(self) -> None:
        """A step has ended."""
        self.trained = time.perf_counter()
        self.first_step = self.first_step or self.trained

    def describe(self) -> str:
        """The three stages, as a part of a log line, when the trial is over; empty if it had no step."""
        if not self.first_step:
            return ""
        before, steps = self.first_step - self.begun, self.trained - self.first_step
        after = time.perf_counter() - self.trained
        return f" ({before:.1f} s to the first step, {steps:.1f} s of steps, {after:.1f} s after)"


class Finishing:
    """Context manager in which trials follow one another; the end of one overlaps with the steps of the next.

    One trial at most is being finished, so that memory holds what two trials need at most. What fails there is
    raised by a later ``follow`` or ``wait``, or at the end of the context.

    Args:
        log: a logger.
    """

    def __init__(self, log: Any):
        self.log = log
        self._rest: futures.Future[Any] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a trial could not be finished: the trial that trains now should stop."""
        return self._rest is not None and self._rest.done() and self._rest.exception() is not None

    def follow(self, trial: Generator[None]) -> None:
        """Do a trial's steps here, and the rest in a thread.

        Args:
            trial: yields once, when its steps are done and the device is free, and returns when nothing is left to
                do. It may return without having yielded.

        Raises:
            BaseException: what the trial raises in its steps, or the trial before it while it was finished.
        """
        if self.has_failed:
            self.wait()
        for _ in trial:
            try:
                self.wait()
            except BaseException:
                self._give_up(trial)  # now, and not when nothing refers to it any more
                raise
            self._rest = in_daemon_thread(lambda: deque(trial, maxlen=0), "finish-trial")
            return

    def _give_up(self, trial: Generator[None]) -> None:
        """End a trial whose steps are done; what fails in this is no cause, and is logged."""
        try:
            trial.close()
        except Exception as error:
            self.log.warning("the last trial was not finished: %s", error)

    def wait(self) -> None:
        """Return when every trial is finished.

        Raises:
            BaseException: what a trial raised meanwhile.
        """
        if (rest := self._rest) is not None:
            futures.wait([rest])
            self._rest = None
            rest.result()

    def __enter__(self) -> Finishing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        """Wait for the trial that is being finished; if a signal has interrupted the body, for 10 s at most.

        After that its thread is left behind, which may wait for MLflow. The next attempt of the sweep does the rest.
        """
        if (rest := self._rest) is None:
            return
        interrupted = error is not None and not isinstance(error, Exception)
        done, _ = futures.wait([rest], _SECONDS if interrupted else None)
        failure = rest.exception() if done else None
        if interrupted and (failure or not done):
            self.log.warning("the trial before was not finished: %s", failure or f"not within {_SECONDS:.0f} s")
        elif failure:
            raise failure from error
