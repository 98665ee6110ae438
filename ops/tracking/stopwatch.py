"""Where the time of a run goes: seconds by step, without gaps between the steps."""

from __future__ import annotations

import time
from contextvars import ContextVar

from ops.display import display


class Stopwatch:
    """Seconds by step. A step begins where the one before it ended; the seconds of equal names add up."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, step: str) -> None:
        """End a step: it gets the seconds since the end of the step before."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        display().phase(step, now - self.last)
        self.last = now


_current: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


def start_stopwatch() -> Stopwatch:
    """A stopwatch that starts now, and that ``end_step`` and ``pipeline_step`` write to from here on."""
    stopwatch = Stopwatch()
    _current.set(stopwatch)
    return stopwatch


def end_step(step: str) -> None:
    """End a step on the current stopwatch; without one, nothing happens."""
    stopwatch = _current.get()
    if stopwatch is not None:
        stopwatch.end(step)
