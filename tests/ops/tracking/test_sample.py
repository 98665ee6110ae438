"""make sample: what it says when it cannot answer. That it answers is shown in tests/test_project.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ops.tracking.sample import main


@pytest.fixture
def tracking_uri(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"no version of gpt2-code-\* is registered at sqlite:"),
        (["--model", "gpt2-code-355m"], "no version of gpt2-code-355m is registered"),
        (["--top-p", "1.5"], "top_p 1.5 is not in"),
        (["--temperature", "-1"], "temperature -1.0 is negative"),
    ],
)
def test_no_answer_is_one_sentence(
    tracking_uri: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["Write a function.", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(sentence, line), line


def test_an_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["  "])
    assert "the prompt is empty" in capsys.readouterr().err


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["Write a function."]) == 1
    assert capsys.readouterr().err.startswith("MLflow at http://127.0.0.1:9 refuses or does not answer")
