"""Where the time of a run goes: seconds by step, without gaps between the steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from ops.redaction import redacted_errors

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds by step. A step begins where the one before it ended; the seconds of equal names add up."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, step: str) -> None:
        """End a step: it gets the seconds since the end of the step before."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        self.last = now


_current: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


def start_stopwatch() -> Stopwatch:
    """A stopwatch that starts now, and that ``end_step`` and ``timed`` write to from here on."""
    stopwatch = Stopwatch()
    _current.set(stopwatch)
    return stopwatch


def end_step(step: str) -> None:
    """End a step on the current stopwatch; without one, nothing happens."""
    stopwatch = _current.get()
    if stopwatch is not None:
        stopwatch.end(step)


def timed(function: Callable[P, R]) -> Callable[P, R]:
    """Make a task's function a step of the run: it ends when the function returns, under the function's name.

    Secrets are redacted in what it raises, which Prefect stores.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with redacted_errors():
            result = function(*args, **kwargs)
        end_step(function.__name__)
        return result

    return wrapper
