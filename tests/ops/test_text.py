"""Texts and errors that can be stored."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ops.text import printable, storable, storable_errors, suggestion, unprintable, unreadable_argument


def test_nothing_moves_the_cursor() -> None:
    assert printable("a → b… 日本") == "a → b… 日本"
    assert printable("\x1b[2J\n\t\u202e\ud800") == "\\x1b[2J\\n\\t\\u202e\\ud800"


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


ROOT = Path(__file__).resolve().parents[2]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}


def _run(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Python with arguments as bytes, in an environment."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, timeout=60)


def test_output_is_escaped_where_its_encoding_lacks_it() -> None:
    """DeepSpeech#1137: a run must not end because a terminal or a pipe is ASCII."""
    code = "from ops.text import escape_output\nif {}: escape_output()\nprint('gr\\xf6\\xdfe')"
    assert b"UnicodeEncodeError" in _run("-c", code.format(False), **ASCII).stderr
    assert _run("-c", code.format(True), **ASCII).stdout == b"gr\\xf6\\xdfe\n"
    assert _run("-c", code.format(True), PYTHONIOENCODING="utf-8").stdout == "größe\n".encode()


def test_arguments_that_are_no_text() -> None:
    """Text passes; bytes that are not UTF-8 are told from a locale that cannot hold them."""
    assert unreadable_argument("größe 日本") is None
    reason = unreadable_argument("gr\udcf6\udcdfe")
    assert reason == "is not valid UTF-8: save or type it as UTF-8"
    assert unreadable_argument("\ud83d") == reason


@pytest.mark.parametrize(
    "arguments", [("-m", "ops.tracking.sample", "größe".encode()), ("-m", "flows", "dataset=größe".encode())]
)
def test_a_locale_that_cannot_hold_an_argument(arguments: tuple[str | bytes, ...], tmp_path: Path) -> None:
    """The argument is right, and the remedy is a variable."""
    done = _run(*arguments, **ASCII, FINETUNE_DATA_ROOT=str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.endswith(" is UTF-8, but Python reads arguments as ascii here: set LC_ALL=C.UTF-8 or PYTHONUTF8=1")


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("epoch", "epochs"),
        ("--Batch-Size", "batch_size"),
        ("lr", "learning_rate"),
        ("batch", "batch_size"),
        ("tyni", "tiny"),
        ("wd", None),  # two have these initials
        ("top", None),
        ("", None),
        ("x", None),
    ],
)
def test_a_near_name_is_suggested(typed: str, near: str | None) -> None:
    """What is misspelled, shortened, or has its letters in another order; nothing where two names would do."""
    known = [
        "epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "weights_dir",
        "top_a_long",
        "top_b_long",
        "tiny",
    ]
    assert suggestion(typed, known) == (f": did you mean {near}?" if near else "")


def test_what_a_line_cannot_hold() -> None:
    """Spaces and letters of any script are a line's."""
    assert unprintable("größe 字 a b") is None
    for character in "\n", "\t", "\x1b", "\x85", "\u2028":
        assert unprintable(f"a{character}b") == f"printable characters on one line are allowed, not {character!r}"
