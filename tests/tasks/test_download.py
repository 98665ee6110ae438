"""Finding and verifying inputs; the hub itself is tested in tests/ops/test_hub.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import flip
from prefect.logging import disable_run_logger

from model.net.config import PRESETS
from ops.hub import PINNED_WEIGHTS
from tasks.config import SourceConfig
from tasks.download import download
from tasks.references import Sources


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))


def _download(**changes: Any) -> Sources:
    given: dict[str, Any] = {
        "dataset": "demo",
        "dataset_revision": None,
        "model_size": "tiny",
        "weights_dir": None,
        "tokenizer_dir": None,
    }
    with disable_run_logger():
        return download.fn(SourceConfig(**{**given, **changes}))


def test_demo_is_made_once() -> None:
    """The embedded inputs are the same at every call, and references are plain data."""
    first, second = _download(), _download()
    assert first == second
    assert set(first.dataset.splits) == {"train", "test"}
    assert set(first.weights.files) == {"config.json", "model.safetensors"}


def test_local_files(data_dir: Path, gpt2_dir: Path) -> None:
    """A file, a folder and a weights directory are taken as they are, with their hashes."""
    folder = _download(dataset=str(data_dir), weights_dir=str(gpt2_dir))
    file = _download(dataset=str(data_dir / "train.jsonl"), weights_dir=str(gpt2_dir))
    assert folder.dataset.splits == file.dataset.splits
    assert folder.weights.directory == folder.weights.tokenizer_directory == str(gpt2_dir)
    assert folder.dataset.revision is None


def test_changed_weights_are_refused(tmp_path: Path, gpt2_dir: Path) -> None:
    """One flipped byte: safetensors loads it without a word, the hash of the first use does not match."""
    weights = shutil.copytree(gpt2_dir, tmp_path / "weights")
    _download(weights_dir=str(weights))
    _download(weights_dir=str(weights))
    file = weights / "model.safetensors"
    flip(file)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file it was") as caught:
        _download(weights_dir=str(weights))
    record = tmp_path / "root" / "trusted-weights.json"
    assert str(record) in str(caught.value)
    # The way out that the message names.
    known = json.loads(record.read_text())
    del known[str(file)]
    record.write_text(json.dumps(known))
    _download(weights_dir=str(weights))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"dataset": "./missing.jsonl"}, FileNotFoundError, "missing.jsonl does not exist"),
        ({"dataset": "rows.xlsx"}, FileNotFoundError, "rows.xlsx does not exist"),
        ({"weights_dir": "/no/such/place"}, FileNotFoundError, "weights_dir /no/such/place does not exist: give"),
        ({"tokenizer_dir": "/no/such/place"}, FileNotFoundError, "tokenizer_dir /no/such/place does not exist: give"),
        ({"model_size": "125m"}, ValueError, "choose one of tiny, 124m"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    """The message names the parameter or the path."""
    with pytest.raises(error, match=match):
        _download(**changes)


def test_weights_without_config(tmp_path: Path, gpt2_dir: Path) -> None:
    """A directory that lacks config.json is named, with the file."""
    weights = shutil.copytree(gpt2_dir, tmp_path / "weights")
    (weights / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        _download(weights_dir=str(weights))


def test_every_size_has_weights() -> None:
    """A preset without pinned weights would fail when it is downloaded."""
    assert PINNED_WEIGHTS.keys() == PRESETS.keys() - {"tiny"}, "add the size to ops.hub.PINNED_WEIGHTS"


def test_a_parameter_of_two_lines_is_one_sentence(tmp_path: Path) -> None:
    """A path may have any character."""
    with pytest.raises(FileNotFoundError) as caught:
        _download(weights_dir=f"{tmp_path}/a\nb")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["~nobody-has-this-name/x", "x" * 300, "a\0b/c/d"])
@pytest.mark.parametrize("name", ["dataset", "weights_dir", "tokenizer_dir"])
def test_a_parameter_that_can_be_no_path_is_named(name: str, value: str) -> None:
    """One sentence, not RuntimeError or OSError."""
    with pytest.raises(ValueError, match=f"^{name} .* is not a path: "):
        _download(**{name: value})
