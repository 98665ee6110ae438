"""Which errors are mistakes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from model.engine.config import TrainConfig
from model.files import path_of
from model.net.config import normalize_size
from ops.databases import DatabaseError
from ops.mistakes import DEBUG_VARIABLE, MACHINE, USER, UsageError, exit_status, sentence, tell
from ops.settings import Settings


def _raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _raise(error: Exception) -> None:
    raise error


def test_what_this_project_raises_is_a_mistake() -> None:
    """Whatever its type; of a value it is the user's, else the machine's."""
    assert exit_status(_raised(lambda: normalize_size("9m"))) == USER
    assert exit_status(_raised(lambda: path_of("dataset", "~nobody-of-this-name/x"))) == USER
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_DATA_ROOT", "what?")
        assert exit_status(_raised(Settings.load)) == USER
    assert exit_status(UsageError("")) == USER


@pytest.mark.parametrize(
    "function",
    [
        lambda: normalize_size(**{"size": "124m"}),  # type: ignore[arg-type]
        lambda: int("x"),
        lambda: {}["x"],
        lambda: os.stat("/nowhere"),
        lambda: TrainConfig(batch_size=0).total_steps(5),  # in this project's own line, but by Python
        lambda: _raise(ValueError("by a test")),
        lambda: _raise(DatabaseError("by a test")),
    ],
)
def test_what_others_raise_is_a_bug(function: Callable[[], Any]) -> None:
    """A library, Python itself, or code that is not of these packages."""
    assert exit_status(_raised(function)) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_the_system_refuses_is_the_machine_s(number: int) -> None:
    """Wherever it is raised; the sentence has the path and no number."""
    error = _raised(lambda: _raise(OSError(number, os.strerror(number), "/x/y")))
    assert exit_status(error) == MACHINE
    assert sentence(error) == f"/x/y: {os.strerror(number)}"


def test_a_sentence_is_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """And can be stored."""
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-token")
    assert sentence(ValueError("one\n two s3cr3t-token \ud800")) == "one two [secret] \\ud800"


def test_tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bugs pass, and with --debug everything does."""
    mistake = _raised(lambda: normalize_size("9m"))
    assert tell(mistake) == USER
    assert capsys.readouterr().err.startswith("model_size '9m' is unknown")
    with pytest.raises(ValueError, match="literal"):
        tell(_raised(lambda: int("x")))
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="9m"):
        tell(mistake)
