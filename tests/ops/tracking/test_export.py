"""The export command: a directory, a hub, a GGUF file; and what is said when a version cannot be taken out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub
from made_up import MAKE, ROOT

from model import GPTModel
from model.demo import EMBEDDED_BASE
from model.files import sha256_file
from model.net.gguf_file import GGUF_TYPES
from model.net.loading import write_with_tokenizer
from model.net.tokenizer import load_tokenizer
from ops.parsers import export_parser
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.export import main
from ops.tracking.flavour import add_flavour
from ops.tracking.models import log_model
from ops.tracking.runs import tracked_run

NAME = "gpt2-code-tiny"
MODEL = f"models:/{NAME}@champion"
PLAIN = {
    "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as ``publish`` exports a model."""
    path = tmp_path_factory.mktemp("export") / "model"
    model = GPTModel.from_pretrained(EMBEDDED_BASE)
    write_with_tokenizer(model, load_tokenizer(EMBEDDED_BASE, model.config.vocab_size), path)
    (path / "README.md").write_text("---\nlicense: other\n---\nA model.\n")
    add_flavour(path, NAME)
    return path


@pytest.fixture(scope="module")
def store(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store with version 1 as an older release registered it, without the flavour, and the champion, version 2."""
    root = tmp_path_factory.mktemp("store")
    settings = Settings(root, f"sqlite:///{root}/mlflow.db")
    for source in (EMBEDDED_BASE, directory):
        with tracked_run(settings, "a run", {}, {}) as run:
            log_model(run, source, NAME, {}, {"test/loss": 1.0}, 3)
    client(settings.tracking_uri).set_registered_model_alias(NAME, "champion", "2")
    return settings


@pytest.fixture(autouse=True)
def _machine(store: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data root of the test's own, the same tracking server."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_a_directory_is_the_plain_model(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What transformers needs, byte for byte, and no file of MLflow."""
    target = tmp_path / "there" / "model"
    assert main([MODEL, "--directory", str(target)]) == 0
    assert capsys.readouterr().out == f"models:/{NAME}/2 is in {target}\n"
    assert _hashes(target) == {name: sha256_file(directory / name) for name in PLAIN}
    assert GPTModel.from_pretrained(target).config.n_layer == 6


def test_a_version_of_an_older_release(tmp_path: Path) -> None:
    """Versions without the flavour are exported as they are."""
    assert main([f"models:/{NAME}/1", "--directory", str(tmp_path / "model")]) == 0
    assert _hashes(tmp_path / "model") == _hashes(EMBEDDED_BASE)


@pytest.fixture(params=["a full directory", "a file", "a link", "a pipe"])
def occupied(request: Any, tmp_path: Path) -> Iterator[Path]:
    """A target that holds something."""
    target = tmp_path / "occupied"
    other = target if request.param == "a full directory" else tmp_path / "other"
    other.mkdir()
    (other / "work.txt").write_text("of someone")
    if request.param == "a file":
        shutil.move(other / "work.txt", target)
    elif request.param == "a link":
        target.symlink_to(other)
    elif request.param == "a pipe":
        os.mkfifo(target)
        yield target
        assert target.is_fifo()
        return
    yield target
    assert (target if target.is_file() else target / "work.txt").read_text() == "of someone"


def test_nothing_is_overwritten(occupied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory with content is left alone."""
    assert main([MODEL, "--directory", str(occupied)]) == 2
    assert "exists already: name a directory that does not, or is empty" in capsys.readouterr().err


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    """As mktemp -d makes it."""
    (tmp_path / "empty").mkdir()
    assert main([MODEL, "--directory", str(tmp_path / "empty")]) == 0
    assert set(_hashes(tmp_path / "empty")) == PLAIN


def test_a_copy_that_is_not_what_was_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that loses bytes without an error: the copy is read back, and does not stay."""
    real = shutil.copyfile

    def lossy(source: Any, target: Any, **options: Any) -> Any:
        done = real(source, target, **options)
        copy = Path(target)
        if copy.name == "model.safetensors" and copy.is_relative_to(tmp_path) and "root" not in copy.parts:
            copy.write_bytes(copy.read_bytes()[:-1] + b"?")
        return done

    monkeypatch.setattr(shutil, "copyfile", lossy)
    assert main([MODEL, "--directory", str(tmp_path / "model")]) == 1
    assert f"is not models:/{NAME}/2: check the disk" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("gpt2-code-tiny", "the model 'gpt2-code-tiny' is none of models:/NAME/VERSION and models:/NAME@ALIAS"),
        (f"models:/{NAME}/9", f"models:/{NAME}/9 is not registered at sqlite:"),
        (f"models:/{NAME}@best", f"models:/{NAME}@best is not registered at sqlite:"),
    ],
)
def test_a_version_that_is_not_there(
    model: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and nothing is written."""
    assert main([model, "--directory", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_place_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The options are offered."""
    with pytest.raises(SystemExit):
        main([MODEL])
    assert "--directory DIR, --push USER/NAME or --gguf FILE" in capsys.readouterr().err


def test_the_types_of_gguf_are_those_of_the_command_line() -> None:
    """--dtype offers what write_gguf takes."""
    (action,) = [action for action in export_parser()._actions if action.dest == "dtype"]
    assert tuple(action.choices or ()) == GGUF_TYPES


def test_all_ways_at_once(hub: FakeHub, directory: Path, tmp_path: Path) -> None:
    """By make, as a user types it: the hub has the plain model in one commit, the card included."""
    options = f"--push someone/tiny --private --gguf {tmp_path}/model.gguf --dtype f16"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_of_this_test"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    command = [*MAKE, "export", f"MODEL={MODEL}", f"DIR={tmp_path / 'a model'}", f"ARGS={options}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    commit = hub.branches["models", "someone/tiny", "main"]
    assert [line for line in done.stdout.splitlines() if line.startswith("models:/")] == [
        f"models:/{NAME}/2 is in {tmp_path / 'a model'}",
        f"models:/{NAME}/2 is in {tmp_path / 'model.gguf'}",
        f"models:/{NAME}/2 is at {hub.endpoint}/someone/tiny/commit/{commit}",
    ]
    assert hub.commits["models", "someone/tiny", commit] == {name: (directory / name).read_bytes() for name in PLAIN}
    assert set(_hashes(tmp_path / "a model")) == PLAIN
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert hub.visibility == {"someone/tiny": "private"}
    assert hub.messages == [f"Upload {NAME} version 2"]


def test_a_hub_that_is_away(tmp_path: Path) -> None:
    """One sentence, without a traceback."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "ops.tracking.export", MODEL, "--push", "someone/tiny"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("could not push to someone/tiny at http://127.0.0.1:9: ConnectError")
    assert "Traceback" not in done.stderr
