"""Texts that Prefect and MLflow cannot store are replaced, so that no state, artifact or error is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def storable(text: str) -> str:
    """A text with its lone surrogates and NULs written as escapes: no UTF-8, JSON or database has them."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and runs of white space."""
    return " ".join(str(error).split())


@contextmanager
def storable_errors() -> Iterator[None]:
    """Let only exceptions pass whose messages can be stored.

    Prefect makes a state's message of the exception's. A flow run whose last state cannot be stored stays Running.
    The exception keeps its type if its arguments can be replaced.
    """
    try:
        yield
    except Exception as error:
        if storable(str(error)) == str(error):
            raise
        message = storable(str(error))
        error.args = tuple(storable(each) if isinstance(each, str) else each for each in error.args)
        for name in ("filename", "filename2"):
            if isinstance(value := getattr(error, name, None), str):
                setattr(error, name, storable(value))
        if storable(str(error)) != str(error):
            raise RuntimeError(f"{type(error).__name__}: {message}") from None
        raise
