"""What every step of the pipeline has: its seconds on the stopwatch, and errors that Prefect may store."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ops.redaction import redacted_errors
from ops.text import storable_errors
from ops.tracking.stopwatch import end_step

P = ParamSpec("P")
R = TypeVar("R")


def pipeline_step(function: Callable[P, R]) -> Callable[P, R]:
    """Make a task's function a step of the run.

    The step ends on the stopwatch when the function returns, under the function's name. The messages of its errors,
    which Prefect stores, hold no secrets and no characters that cannot be stored.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with storable_errors(), redacted_errors():
            result = function(*args, **kwargs)
        end_step(function.__name__)
        return result

    return wrapper
