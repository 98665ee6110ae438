"""Texts and errors that can be stored."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ops.text import storable, storable_errors


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("plain ü 🙂\n", "plain ü 🙂\n"),
        ("lone \ud800 surrogate", "lone \\ud800 surrogate"),
        ("low \udcff", "low \\udcff"),
        ("nul \0", "nul \\x00"),
    ],
)
def test_what_cannot_be_stored_is_escaped(text: str, stored: str) -> None:
    """Everything else stays as it is."""
    assert storable(text) == stored


@pytest.mark.parametrize(
    "error",
    [
        ValueError("row \ud800"),
        FileNotFoundError(errno.ENOENT, "no such file", "/tmp/\udcff"),
        OSError(errno.EXDEV, "two files", "/tmp/a", None, "/tmp/\udcff"),
        KeyError("\0"),
        ValueError(["\ud800"]),
    ],
)
def test_errors_keep_their_type(error: Exception) -> None:
    """Their messages are the same but for the escapes."""
    with pytest.raises(type(error)) as caught, storable_errors():
        raise error
    str(caught.value).encode()
    assert "\0" not in str(caught.value)


def test_an_error_that_makes_its_own_message() -> None:
    """It is replaced by one that says which it was."""

    class Own(Exception):
        def __str__(self) -> str:
            return "own \ud800"

    with pytest.raises(RuntimeError, match=r"Own: own \\ud800"), storable_errors():
        raise Own


def test_other_errors_pass_untouched() -> None:
    """The very exception."""
    error: Any = ValueError("plain")
    with pytest.raises(ValueError, match="plain") as caught, storable_errors():
        raise error
    assert caught.value is error
