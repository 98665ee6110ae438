"""make sample: what it says when it cannot answer. That it answers is shown in tests/test_project.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from model.demo import EMBEDDED_BASE
from ops.settings import Settings
from ops.tracking.models import log_model
from ops.tracking.runs import tracked_run
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
        (["--repetition-penalty", "0"], "repetition_penalty 0.0 is not between 1e-06 and"),
        (["--repetition-penalty", "nan"], "repetition_penalty nan is not between 1e-06 and"),
        (["--temperature", "-1"], "temperature -1.0 is not a number of 0 or more"),
        (["--temperature", "inf"], "temperature inf is more than"),
        (["--temperature", "1e300"], "temperature 1e\\+300 is more than"),
        (["--temperature", "nan"], "temperature nan is not a number of 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens 0: Input should be greater than or equal to 1"),
        (["--seed", "-1"], "seed -1: Input should be greater than or equal to 0"),
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


@pytest.mark.parametrize("prompt", ["gr\udcf6\udcdfe", "\ud83d"])
def test_a_prompt_that_is_no_utf8(capsys: pytest.CaptureFixture[str], prompt: str) -> None:
    """Python hands over bytes that are not UTF-8 as lone surrogates, which no tokenizer takes."""
    assert main([prompt]) == 2
    assert capsys.readouterr().err == "the prompt is not valid UTF-8: save or type it as UTF-8\n"


@pytest.fixture
def registered(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version of the embedded base, and the directory in which MLflow keeps its files."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    settings = Settings.load()
    with tracked_run(settings, "a run", {}, {}) as run:
        version = log_model(run, EMBEDDED_BASE, "gpt2-code-tiny", {}, {"test/loss": 1.0}, 1)
    return settings.artifacts / "models" / version.source.removeprefix("models:/") / "artifacts"


@pytest.mark.parametrize("damage", ["gone", "one file gone", "a bit"])
def test_missing_or_damaged_artifacts_are_one_sentence(
    registered: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """mlflow#12838: the version and what to do, not a path of a temporary folder."""
    if damage == "gone":
        shutil.rmtree(registered)
    elif damage == "one file gone":
        (registered / "tokenizer.json").unlink()
    else:
        content = (registered / "model.safetensors").read_bytes()
        (registered / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["Write a function."]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "models:/gpt2-code-tiny/1" in line
    assert line.endswith("Restore its artifacts, or name another registered model with --model")


def test_a_long_prompt_is_cut_and_said_so(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["Add 1. " * 500, "--max-new-tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"\d+ of the \d+ tokens of prompt 1 were cut, behind the first \d+", told)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["Write a function."]) == 1
    assert capsys.readouterr().err.startswith("MLflow at http://127.0.0.1:9 refuses or does not answer")
