"""MLflow's transformers flavour beside a plain directory: what loads, what it answers, and `mlflow models serve`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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
from ops.tracking.flavour import add_flavour, hash_version, plain_part
from ops.tracking.models import log_model
from ops.tracking.registry import fetch_version
from ops.tracking.runs import client, tracked_run

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
