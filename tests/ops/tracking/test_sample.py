"""make sample: what it says when it cannot answer. That it answers is shown in tests/test_project.py."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.demo import EMBEDDED_BASE
from model.evaluation.completions import complete
from model.evaluation.config import SamplingConfig
from model.net.loading import read_pretrained
from model.net.tokenizer import load_tokenizer
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.lookup import _ask, look_up
from ops.tracking.models import log_model
from ops.tracking.runs import tracked_run
from ops.tracking.sample import main

GONE = r"is not registered at sqlite:\S+, which has"
NAME_ONE = "name one of them, or set MLFLOW_TRACKING_URI to the server of your runs$"


@pytest.fixture
def tracking_uri(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            r"no tuned model \(gpt2-code-\*\) is registered at sqlite:\S+, which has no model: run `make run`, or",
        ),
        (["--model", ""], "'' is not registered"),
        (["--model", "gpt2-code-355m"], "gpt2-code-355m is not registered"),
        (["--model", "a'b"], "a'b is not registered"),
        (["--model", "a' or name like '%"], "a' or name like '% is not registered"),
        (["--model", 'a"b'], 'a"b is not registered'),
        (["--model", "a'b\"c"], "a'b\"c is not registered at "),
        (["--top-p", "1.5"], "top_p 1.5 is not in"),
        (["--repetition-penalty", "0"], "repetition_penalty 0.0 is not between 1e-06 and"),
        (["--repetition-penalty", "nan"], "repetition_penalty nan is not between 1e-06 and"),
        (["--temperature", "-1"], "temperature -1.0 is not a number of 0 or more"),
        (["--temperature", "inf"], "temperature inf is more than"),
        (["--temperature", "1e300"], "temperature 1e\\+300 is more than"),
        (["--temperature", "nan"], "temperature nan is not a number of 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens: at least 1 is needed, not 0"),
        (["--seed", "-1"], "seed: at least 0 is needed, not -1"),
    ],
)
def test_no_answer_is_one_sentence(
    tracking_uri: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["Write a function.", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(sentence, line), line


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """type_in(content): what standard input has, which is no terminal."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", 'the prompt is empty: finetune sample "Write a function that ..."'),
        (b" \n\n", 'the prompt is empty: finetune sample "Write a function that ..."'),
        (b"gr\xf6\xdfe", "the prompt in standard input is not valid UTF-8: save or type it as UTF-8"),
        (b"x" * 1_000_001, "standard input has more than 1,000,000 bytes: give one prompt"),
    ],
    ids=["empty", "blank", "no UTF-8", "long"],
)
@pytest.mark.parametrize("arguments", [[], ["  "], ["-"]], ids=["none", "blank", "dash"])
def test_standard_input_that_is_no_prompt(
    content: bytes,
    said: str,
    arguments: list[str],
    type_in: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(content)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["none", "dash"])
def test_a_prompt_in_standard_input(
    registered: Path,
    arguments: list[str],
    encoding: str,
    type_in: Callable[[bytes], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its lines are one prompt; the answer is that to the same prompt on the command line. No mark is part of it."""
    assert main(["Write a function.\nIt adds é.", "--max-new-tokens", "8"]) == 0
    answer = capsys.readouterr().out
    type_in("Write a function.\nIt adds é.\n".encode(encoding))
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == answer


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
        version = log_model(run, EMBEDDED_BASE, "gpt2-code-tiny", {"base": "embedded"}, {"test/loss": 1.0}, 1)
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


@pytest.mark.parametrize(
    "wanted", ["models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny@champion", "gpt2-code-tiny", "run"]
)
def test_a_version_has_many_names(
    registered: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    """Its URI, its alias, its run and its model."""
    mlflow = client(tracking_uri)
    mlflow.set_registered_model_alias("gpt2-code-tiny", "champion", "1")
    name = mlflow.get_model_version("gpt2-code-tiny", "1").run_id if wanted == "run" else wanted
    assert main(["Write a function.", "--model", name, "--max-new-tokens", "2"]) == 0
    assert "gpt2-code-tiny version 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            "models:/gpt2-code-tiny/7",
            rf"models:/gpt2-code-tiny/7 {GONE} version 1 of it and alias best \(version 1\): {NAME_ONE}",
        ),
        ("models:/gpt2-code-tiny@worst", rf"models:/gpt2-code-tiny@worst {GONE} version 1 of it and alias best"),
        ("gpt2-code-355m", rf"gpt2-code-355m {GONE} the models gpt2-code-tiny: {NAME_ONE}"),
        ("models:/gpt2-code-355m/1", rf"models:/gpt2-code-355m/1 {GONE} the models gpt2-code-tiny: {NAME_ONE}"),
        ("models:/x", "--model 'models:/x' is none of models:/NAME/VERSION and models:/NAME@ALIAS"),
        ("0" * 32, rf"0{{32}} {GONE} the models gpt2-code-tiny: {NAME_ONE}"),
    ],
)
def test_a_version_that_is_not_there(
    registered: Path, tracking_uri: str, capsys: pytest.CaptureFixture[str], wanted: str, sentence: str
) -> None:
    """What is there is named: read from the tables, and asked of MLflow's client."""
    mlflow = client(tracking_uri)
    mlflow.set_registered_model_alias("gpt2-code-tiny", "best", "1")
    assert main(["Write a function.", "--model", wanted]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(sentence, line), line
    if "is none of" not in sentence:
        with pytest.raises(LookupError) as error:
            _ask(mlflow, wanted)
        assert str(error.value) == line


def test_the_base_is_shown_beside(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both answer the same prompt; here both are the same model."""
    assert main(["Write a function.", "--base", "--max-new-tokens", "8"]) == 0
    base, tuned = capsys.readouterr().out.split("--- gpt2-code-tiny version 1\n")
    assert base.removeprefix("--- base (embedded)\n") == tuned
    assert tuned.strip()


def test_a_base_that_is_not_known_is_one_sentence(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    with tracked_run(Settings.load(), "a run", {}, {}) as run:
        log_model(run, EMBEDDED_BASE, "gpt2-code-tiny", {"base": "/no/such/folder"}, {"test/loss": 1.0}, 1)
    assert main(["Write a function.", "--base"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("the base of models:/gpt2-code-tiny/1 was /no/such/folder, which cannot be found")


def test_what_is_streamed_is_what_is_completed(registered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Token by token, characters of several tokens included, the text is that of a whole completion."""
    network = read_pretrained(EMBEDDED_BASE, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(EMBEDDED_BASE, network.config.vocab_size)
    for options in ([], ["--temperature", "1.5", "--seed", "3"]):
        settings = {"temperature": 0.0, "top_k": None, "top_p": None, "max_new_tokens": 60}
        settings |= {"temperature": 1.5, "seed": 3} if options else {}
        ((text, _),) = complete(network, tokenizer, ["Write é in 中文."], SamplingConfig(**settings))
        assert main(["Write é in 中文.", "--max-new-tokens", "60", *options]) == 0
        assert capsys.readouterr().out == f"{text}\n"


def test_tokens_appear_as_they_are_drawn(registered: Path, tracking_uri: str, tmp_path: Path) -> None:
    """On a pseudo-terminal without a prompt: lines are answered by a model that is loaded once, piece by piece."""
    leader, follower = pty.openpty()
    asking = subprocess.Popen(
        [sys.executable, "-m", "ops.tracking.sample", "--max-new-tokens", "60"],
        stdin=follower, stdout=follower, stderr=subprocess.PIPE, close_fds=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "FINETUNE_DATA_ROOT": str(tmp_path / "root")},
    )  # fmt: skip
    os.close(follower)
    try:
        pieces: list[bytes] = []
        for line in (b"Write a function.\n", b"\n", b"Add two numbers.\n"):
            os.write(leader, line)
        os.write(leader, b"\x04")
        with suppress(OSError):  # Linux ends a pseudo-terminal so
            while piece := os.read(leader, 1 << 16):
                pieces.append(piece)
        _, told = asking.communicate(timeout=120)
    finally:
        asking.kill()
        os.close(leader)
    assert asking.returncode == 0
    assert told.decode().splitlines() == ["gpt2-code-tiny version 1", "a line is a prompt; Ctrl-D ends"]
    assert b"".join(pieces).count(b"> ") >= 3
    assert len(pieces) > 10, "an answer of 60 tokens comes in pieces"


def test_an_answer_waits_for_no_slow_import(registered: Path, tracking_uri: str, tmp_path: Path) -> None:
    """Each takes a second or more; the registry on sqlite, the tokenizer and the model are read without them."""
    script = (
        "import sys\nfrom ops.tracking.sample import main\n"
        "SLOW = ('mlflow', 'transformers', 'pandas', 'sqlalchemy', 'torch._dynamo', 'sympy')\n"
        "status = main(['Write a function.', '--max-new-tokens', '2'])\n"
        "print(status, [name for name in SLOW if name in sys.modules])"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "FINETUNE_DATA_ROOT": str(tmp_path / "root")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_the_client_finds_what_the_tables_hold(registered: Path, tracking_uri: str) -> None:
    """What is asked of a server is what is read of sqlite, but for the folder of the files."""
    mlflow = client(tracking_uri)
    mlflow.set_registered_model_alias("gpt2-code-tiny", "champion", "1")
    run_id = mlflow.get_model_version("gpt2-code-tiny", "1").run_id
    for wanted in (None, "gpt2-code-tiny", "models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny@champion", run_id):
        read = look_up(tracking_uri, wanted)
        assert read.folder is not None
        assert replace(read, folder=None) == _ask(mlflow, wanted)
    mlflow.delete_model_version("gpt2-code-tiny", "1")
    with pytest.raises(LookupError, match="gpt2-code-tiny is not registered"):
        look_up(tracking_uri, "gpt2-code-tiny")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["Write a function."]) == 1
    assert capsys.readouterr().err.startswith(
        "MLflow at http://127.0.0.1:9 does not answer (Connection refused): start it, or set"
    )
