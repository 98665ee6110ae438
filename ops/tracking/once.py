"""Creating something in MLflow once, even if the answer to the request is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_TRIES = 3
_PAUSE_SECONDS = 2.0


def create_once(create: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Call ``create`` until the server answers, and do not create a second one if it dies before its answer.

    MLflow's client repeats a request whose connection broke (mlflow#8238): the server may have done it already, and
    creates another run or version then. Here ``find`` looks before a request is repeated.

    Args:
        create: sends the request.
        find: what an earlier request created; None if there is none.

    Raises:
        MlflowException: the server refuses, or does not answer.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(_TRIES)):
        try:
            with environment("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"):
                return create()
        except MlflowException as error:
            if error.error_code != "INTERNAL_ERROR" or not left:  # refused, which a repetition does not change
                raise
        time.sleep(_PAUSE_SECONDS)
        if (found := find()) is not None:
            return found
    raise AssertionError("the last try returns or raises")


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable that MLflow reads at every request."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
