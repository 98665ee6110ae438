"""MLflow's transformers flavour beside a plain directory: what loads, what it answers, and `mlflow models serve`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from model import GPTConfig, GPTModel
from model.demo import EMBEDDED_BASE
from model.evaluation.completions import complete
from model.evaluation.config import SamplingConfig
from model.files import sha256_file
from model.net.loading import read_pretrained, write_with_tokenizer
from model.net.prompt import encode
from model.net.tokenizer import load_tokenizer
from ops.settings import Settings
from ops.tracking import flavour
from ops.tracking.connection import client
from ops.tracking.flavour import add_flavour, hash_version, plain_part
from ops.tracking.models import log_model
from ops.tracking.registry import fetch_version
from ops.tracking.runs import tracked_run

NAME = "gpt2-code-tiny"
PLAIN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# Braces, because MLflow renders with str.format; a blank line, because two of them end the format's parts.
PROMPTS = ["Write a Python function that adds two numbers.", 'Return {"a": {0}} {prompt}', "One line\n\nand another"]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as ``publish`` exports a model."""
    path = tmp_path_factory.mktemp("flavour") / "model"
    network = read_pretrained(EMBEDDED_BASE, torch.device("cpu"), torch.float32)
    write_with_tokenizer(network, load_tokenizer(EMBEDDED_BASE, network.config.vocab_size), path)
    add_flavour(path, NAME)
    return path


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """This project's own greedy completions of the prompts."""
    network = read_pretrained(EMBEDDED_BASE, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(EMBEDDED_BASE, network.config.vocab_size)
    greedy = SamplingConfig(temperature=0.0, top_k=None, top_p=None, max_new_tokens=NEW_TOKENS)
    return [completion.text for completion in complete(network, tokenizer, PROMPTS, greedy)]


@pytest.fixture(scope="module")
def registered(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store in which the directory is version 1."""
    root = tmp_path_factory.mktemp("store")
    settings = Settings(root, f"sqlite:///{root}/mlflow.db")
    with tracked_run(settings, "a run", {}, {}) as run:
        log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3)
    return settings


def test_the_directory_is_the_flavours_model(directory: Path) -> None:
    """The weights are there once, nothing is pickled, and the plain model is what was there before."""
    files = hash_version(directory)
    assert set(plain_part(files)) == PLAIN
    assert [name for name in files if name.endswith((".safetensors", ".bin", ".pkl", ".pt"))] == ["model.safetensors"]
    twice = sum((directory / name).stat().st_size for name in files if name.startswith("components/"))
    assert twice < 300_000  # the tokenizer


def test_equal_directories_get_equal_files(directory: Path, tmp_path: Path) -> None:
    """A run that is repeated behind an interruption must find the version that it registered."""
    first = hash_version(directory)
    for name in plain_part(first):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    add_flavour(tmp_path, NAME)
    assert hash_version(tmp_path) == first
    add_flavour(tmp_path, NAME)  # as a retried task
    assert hash_version(tmp_path) == first
    assert str(directory) not in (directory / "MLmodel").read_text()


def test_kept_files_are_those_that_would_be_made(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only weights and model card may differ; a damaged file is made again, and so is that of another tokenizer."""
    first, kept = hash_version(directory), tmp_path / "kept"

    def add(place: Path) -> dict[str, str]:
        place.mkdir()
        for name in plain_part(first):
            (place / name).write_bytes((directory / name).read_bytes())
        add_flavour(place, NAME, kept)
        return hash_version(place)

    assert add(tmp_path / "a") == first
    made = []
    write = flavour._write_flavour
    monkeypatch.setattr(flavour, "_write_flavour", lambda *given: (made.append(given), write(*given)))
    assert add(tmp_path / "b") == first
    assert not made
    (template,) = kept.iterdir()
    (template / "components" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert add(tmp_path / "c") == first
    assert len(made) == 1
    (template / "sha256.json").write_text("{")
    assert add(tmp_path / "d") == first
    assert len(made) == 2
    config = tmp_path / "d" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"extra": 1, "eos_token"'))
    add_flavour(tmp_path / "d", NAME, kept)
    assert len(made) == 3
    assert len([*kept.iterdir()]) == 2


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # where HF_HUB_DISABLE_PROGRESS_BARS is set
def test_nothing_is_said_and_gpt2s_tokenizer_is_loaded(
    tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of OpenAI's weights the tokenizer is of another class, GPT2Tokenizer, and MLflow loads it by that name."""
    import mlflow
    from transformers.utils import logging

    logging.enable_progress_bar()
    tokenizer = load_tokenizer(tokenizer_dir, 320)
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=320)
    write_with_tokenizer(GPTModel(shape), tokenizer, tmp_path)
    add_flavour(tmp_path, NAME)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert logging.is_progress_bar_enabled()
    loaded = mlflow.transformers.load_model(str(tmp_path)).tokenizer
    assert type(loaded).__name__ == "GPT2Tokenizer"
    assert encode(loaded, PROMPTS) == encode(tokenizer, PROMPTS)


def test_pyfunc_takes_an_instruction_and_gives_the_answer(directory: Path, answers: list[str]) -> None:
    """The training's prompt format is rendered by MLflow, and the prompt is not repeated."""
    import mlflow

    model = mlflow.pyfunc.load_model(str(directory))
    assert model.predict(PROMPTS, params={"max_new_tokens": NEW_TOKENS}) == answers
    assert [parameter.name for parameter in model.metadata.signature.params] == [
        "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    ]  # fmt: skip
    assert len(model.predict("Write a function.", params={"max_new_tokens": 3, "do_sample": True})) == 1


@pytest.mark.parametrize("new_tokens", [NEW_TOKENS, 400])
def test_an_instruction_beyond_the_context_is_cut_as_in_the_evaluation(
    directory: Path, new_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end and the headings stay; the server's log says what was cut. The answer ends where the context does."""
    import mlflow

    network = read_pretrained(EMBEDDED_BASE, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(EMBEDDED_BASE, network.config.vocab_size)
    greedy = SamplingConfig(temperature=0.0, top_k=None, top_p=None, max_new_tokens=min(new_tokens, 256))
    instruction = "x = 1; " * 1400 + "Write a Python function that adds two numbers."
    (want,) = complete(network, tokenizer, [instruction], greedy)
    with caplog.at_level("WARNING"):
        answer = mlflow.pyfunc.load_model(str(directory)).predict(
            [instruction], params={"max_new_tokens": new_tokens}
        )
    assert [text.strip() for text in answer] == [want.text.strip()]
    assert "its first ones were cut and" in caplog.text
    assert ("has 256 tokens at most: the context ends" in caplog.text) == (new_tokens == 400)


@pytest.mark.parametrize(
    ("data", "params", "sentence"),
    [
        ([""], {}, "instruction 1 is empty"),
        (["x", " \n"], {}, "instruction 2 is empty"),
        (["x"], {"max_new_tokens": 0}, "max_new_tokens is 0: it must be from 1 to 511"),
        (["x"], {"max_new_tokens": 512}, "max_new_tokens is 512: it must be from 1 to 511"),
        (
            ["x"],
            {"do_sample": True, "temperature": 0.0},
            "temperature is 0.0: it must be from 1e-06 to 1e+06, or do_",
        ),
        (["x"], {"do_sample": True, "top_k": -1}, "top_k is -1: it must be 0 or more"),
        (["x"], {"do_sample": True, "top_p": 7.0}, "top_p is 7.0: it must be from 1e-06 to 1"),
        (["x"], {"top_p": float("nan")}, "top_p is nan: it must be from 1e-06 to 1"),
        (["x"], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0: it must be from 1e-06 to 1e+06"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    directory: Path, data: list[str], params: dict[str, Any], sentence: str
) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(directory))
    with pytest.raises(mlflow.exceptions.MlflowException, match=re.escape(sentence)) as refused:
        model.predict(data, params=params)
    assert refused.value.get_http_status_code() == 400


def test_what_a_server_hands_on_is_one_instruction_a_row(directory: Path) -> None:
    """A table of one column; other tables and other values are refused by name."""
    import mlflow
    import pandas as pd

    served = mlflow.pyfunc.load_model(str(directory))._model_impl
    greedy = {"max_new_tokens": 2, "do_sample": False}
    assert served.predict(pd.DataFrame({"any": PROMPTS}), greedy) == served.predict(PROMPTS, greedy)
    for data, sentence in (
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "the request has 2 columns: it needs one, of instructions"),
        ([None], "instruction 1 is None: it must be a text"),
        (["x", 5], "instruction 2 is 5: it must be a text"),
        ([], "the request has no instruction"),
    ):
        with pytest.raises(mlflow.exceptions.MlflowException, match=sentence):
            served.predict(data, greedy)


def test_pipelines_render_messages_as_the_training_did(directory: Path, answers: list[str]) -> None:
    """mlflow.transformers.load_model and transformers.pipeline give the same, with the tokenizer's chat template."""
    import mlflow
    import transformers

    loaded = mlflow.transformers.load_model(str(directory))
    for ask in (loaded, transformers.pipeline("text-generation", str(directory))):
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            messages = [{"role": "user", "content": prompt}]
            (got,) = ask(messages, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert got["generated_text"] == [*messages, {"role": "assistant", "content": answer}]


def test_a_version_with_the_flavour_is_verified_with_its_folders(registered: Settings, tmp_path: Path) -> None:
    """Each file counts, those in folders too; what MLflow adds to a download does not."""
    version = client(registered.tracking_uri).get_model_version(NAME, "1")
    machine = Settings(tmp_path / "root", registered.tracking_uri)
    path, files = fetch_version(machine, version, print)
    assert "components/tokenizer/tokenizer.json" in files
    assert not (path / "registered_model_meta").exists()
    said: list[str] = []
    assert fetch_version(machine, version, said.append) == (path, files)
    assert said == []
    (path / "components" / "tokenizer" / "tokenizer.json").write_text("{}")
    fetch_version(machine, version, said.append)
    assert "is downloaded again" in said[0]
    assert sha256_file(path / "components" / "tokenizer" / "tokenizer.json") == files["tokenizer.json"]


@pytest.fixture
def server(registered: Settings, tmp_path: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    environment = os.environ | {"MLFLOW_TRACKING_URI": registered.tracking_uri, "PATH": programs}
    log = tmp_path / "serve.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, cwd=tmp_path, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                if requests.get(f"{address}/ping", timeout=2).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text())
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)  # the server is a child of the command
        process.wait(30)


@pytest.mark.slow
def test_mlflow_models_serve_answers_a_prompt(server: str, answers: list[str]) -> None:
    """Over HTTP, in the form that the model card shows."""
    body = {"inputs": PROMPTS, "params": {"max_new_tokens": NEW_TOKENS}}
    answer = requests.post(f"{server}/invocations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.text) == {"predictions": answers}
    wrong: dict[str, Any] = {"inputs": PROMPTS, "params": {"max_new_tokens": "many"}}
    refused = requests.post(f"{server}/invocations", json=wrong, timeout=120)
    assert refused.status_code == 400
    assert "max_new_tokens" in refused.text
    few = {"max_new_tokens": 2}
    for body, part in (
        ({"inputs": []}, "missing inputs"),
        ({"inputs": None}, "NoneType"),
        ({"inputs": {"prompt": "x"}}, "dict"),
        ({"inputs": [""]}, "instruction 1 is empty"),
        ({"inputs": ["x"], "params": {"max_new_tokens": 10_000}}, "it must be from 1 to 511"),
        ({"inputs": ["x"], "params": {"do_sample": True, "temperature": 0.0}}, "temperature is 0.0"),
        ({"messages": [{"role": "user", "content": "x"}]}, "instruction 1 is {"),
    ):
        refused = requests.post(f"{server}/invocations", json=body, timeout=120)
        assert (refused.status_code, part in refused.text) == (400, True), (body, refused.text)
        assert "stack_trace" not in refused.text
    for body in ({"inputs": ["x" * 10_000], "params": few}, {"inputs": ["x"], "params": few | {"unknown": 1}}):
        assert requests.post(f"{server}/invocations", json=body, timeout=120).status_code == 200, body


def test_runs_that_publish_at_the_same_time_make_the_files_once(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for those of the first: what it copies is not replaced meanwhile."""
    made = []

    def write(source: Path, target: Path) -> None:
        made.append(source)
        time.sleep(0.5)
        for name in (*flavour.FLAVOUR_FILES, "components/x"):
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes((directory / "MLmodel").read_bytes())

    monkeypatch.setattr(flavour, "_write_flavour", write)
    places = [tmp_path / name for name in "abc"]
    for place in places:
        place.mkdir()
        (place / "config.json").write_text("{}")
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda place: add_flavour(place, NAME, tmp_path / "root" / "kept"), places))
    assert len(made) == 1
    assert hash_version(places[0]) == hash_version(places[1]) == hash_version(places[2])


def test_a_kept_flavour_is_named_by_the_code_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what was imported: its file may have been edited since."""
    before = flavour._key([])
    edited = tmp_path / "flavour.py"
    edited.write_text(Path(flavour.__file__).read_text() + "# another line\n")
    (tmp_path / "served_model.py").write_text(flavour._served_model().read_text())
    monkeypatch.setattr(flavour, "__file__", str(edited))
    assert flavour._key([]) == before
