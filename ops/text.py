"""Texts that Prefect, MLflow or a terminal cannot take are replaced, so that no state, artifact or error is lost."""

from __future__ import annotations

import difflib
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def storable(text: str) -> str:
    """A text with its lone surrogates and NULs written as escapes: no UTF-8, JSON or database has them."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def printable(text: str) -> str:
    """A text for a line of a terminal: what moves the cursor, colours or reorders text is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unprintable(text: str) -> str | None:
    """Why a text is refused that breaks the lines of a log or moves the cursor of a terminal; None if it does not."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            return f"printable characters on one line are allowed, not {character!r}"
    return None


def as_setting(value: Any) -> str:
    """A parameter's value as a user writes it, in ``name=value`` and in prefect.yaml: null, true, false."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and runs of white space."""
    return " ".join(str(error).split())


def suggestion(typed: str, known: Iterable[str]) -> str:
    """``: did you mean NAME?`` for what is nearly a known name, its initials or its beginning; else nothing."""
    by_form = {_form(name): name for name in known}
    form = _form(typed)
    near = difflib.get_close_matches(form, by_form) or [name for name in by_form if form and _shortens(form, name)]
    unsure = len(near) > 1 and not difflib.get_close_matches(form, near)
    return f": did you mean {by_form[near[0]]}?" if near and not unsure else ""


def _shortens(form: str, name: str) -> bool:
    """Whether a form is the beginning of a name or its initials, as lr of learning_rate, or has its letters."""
    initials = "".join(word[:1] for word in name.split("_"))
    return name.startswith(form) or form == initials or sorted(form) == sorted(name)


def _form(name: str) -> str:
    """A name without what a person may write in another way; the dashes of an option would make all options alike."""
    return name.lower().replace("-", "_").lstrip("_")


def escape_output() -> None:
    """Let stdout show characters that its encoding lacks as escapes, as stderr does, instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def unreadable_argument(text: str) -> str | None:
    """Why an argument of the command line is no text, and what to do; None if it is text.

    Python hands over bytes that the encoding of the locale lacks as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(text).decode()
        except UnicodeError:
            return "is not valid UTF-8: save or type it as UTF-8"
        return (
            f"is UTF-8, but Python reads arguments as {sys.getfilesystemencoding()} here: set LC_ALL=C.UTF-8 or "
            "PYTHONUTF8=1"
        )
    return None


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
