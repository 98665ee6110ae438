"""The base's files: trusted at first use, once they have loaded; and never loaded when they have changed since."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.logging import disable_run_logger
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from model.data.preparing import PrepareConfig
from model.demo import EMBEDDED_BASE, EMBEDDED_SHA256
from model.engine.config import TrainConfig
from model.files import ChangedFileError, sha256_file, sha256_json
from model.net.config import GPTConfig
from model.net.freezing import FreezeConfig, plan_freeze
from ops.settings import Settings
from tasks.choose import choose
from tasks.download import SourceConfig, download
from tasks.evaluate import evaluate
from tasks.frozen import load_frozen
from tasks.load_weights import check_weights
from tasks.prepare import find_or_write_tokens
from tasks.publish import export
from tasks.references import CheckpointRef, Sources, TrainingRef
from tasks.train import identify_training, train
from tasks.weights import find_weights

PREPARE = PrepareConfig(max_length=80, validation_share=0.2, test_share=0.2)


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the embedded base, as a user's own directory of weights."""
    return Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "base"))


def _find(directory: Path | None, **changes: Any) -> Any:
    given = {"weights_dir": str(directory) if directory else None, "tokenizer_dir": None, **changes}
    return find_weights(Settings.load(), "tiny", **given)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _swap_entries(directory: Path) -> None:
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(raw))


def _nan(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, path)


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
    "LFS pointer": lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "NaN": _nan,
    "config": lambda d: (d / "config.json").write_text("<html>"),
    "tokenizer": lambda d: (d / "tokenizer.json").write_text("{}"),
    "tokenizer settings": lambda d: (d / "tokenizer_config.json").write_text("{"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_not_recorded_so_the_repaired_one_is_taken(base: Path, kind: str) -> None:
    """OmniParser#34: what never loaded was never trusted. Once the whole files were used, they are."""
    whole = {path.name: path.read_bytes() for path in base.iterdir()}
    BROKEN[kind](base)
    with pytest.raises(ValueError):  # noqa: PT011  # each kind has its own sentence, tested elsewhere
        _find(base)
    for name, content in whole.items():
        (base / name).write_bytes(content)
    assert _find(base) == _find(base)
    BROKEN[kind](base)
    with pytest.raises(ValueError, match="is not the file it was at first use"):
        _find(base)


def test_swapped_entries_between_two_runs(base: Path) -> None:
    """The tokenizer's files are trusted at first use as the weights are."""
    _find(base)
    _swap_entries(base)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file it was at first use"):
        _find(base)


def test_a_tokenizer_elsewhere_is_trusted_in_the_same_way(base: Path) -> None:
    """Also beside the embedded weights."""
    weights = _find(None, tokenizer_dir=str(base))
    assert weights.tokenizer_files == {name: EMBEDDED_SHA256[name] for name in weights.tokenizer_files}
    _swap_entries(base)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file it was at first use"):
        _find(None, tokenizer_dir=str(base))


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"a": 1}', "\x80", "[" * 100_000])
def test_a_damaged_record_is_one_sentence(base: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "root").mkdir()
    record = tmp_path / "root" / "trusted-weights.json"
    record.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"trusted-weights\.json is damaged: .*\. Mend it, or remove it to trust"):
        _find(base)


def test_a_file_instead_of_its_directory(base: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory but a file: name the directory that holds it"):
        _find(base / "model.safetensors")


@pytest.mark.parametrize("name", ["weights_dir", "tokenizer_dir"])
def test_an_empty_path_is_a_mistake(name: str) -> None:
    """It stood for null: the embedded base was trained in place of the user's."""
    with pytest.raises(ValidationError, match=name):
        TypeAdapter(SourceConfig).validate_python({name: ""})


# The embedded base


def test_the_embedded_base_is_that_of_the_code() -> None:
    """Ties the hashes in the code to the files; ``python -m model.demo.pretrain`` prints them."""
    found = {path.name: sha256_file(path) for path in EMBEDDED_BASE.iterdir() if path.name != "README.md"}
    assert found == EMBEDDED_SHA256


@pytest.mark.parametrize("name", EMBEDDED_SHA256)
def test_a_bit_flip_in_the_embedded_base_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A copy stands for it."""
    monkeypatch.setattr("tasks.weights.EMBEDDED_BASE", base)
    assert _find(None).directory == str(base)
    _flip(base / name)
    with pytest.raises(ValueError, match=rf"{name} is not the file of this release.*restore it"):
        _find(None)


# What was hashed is what is loaded


@pytest.fixture
def sources(base: Path, data_dir: Path) -> Sources:
    with disable_run_logger():
        return download.fn(SourceConfig("tiny", str(data_dir), weights_dir=str(base)))


@pytest.fixture
def training(sources: Sources) -> TrainingRef:
    with disable_run_logger():
        tokens = find_or_write_tokens(sources, PREPARE)
    model = check_weights(sources.weights, "tiny")
    plan = plan_freeze(GPTConfig(**model.config), FreezeConfig(num_unfrozen_layers=1))
    return identify_training(tokens, model, plan, TrainConfig(precision="fp32", max_steps=1), "cpu")


CHECKPOINT = CheckpointRef("no", "no", 0, 0.0, 0.0, 0, 0, 2_048, "no")
# Each step that loads the base or its tokenizer.
LOADINGS: dict[str, Callable[[Sources, TrainingRef], object]] = {
    "prepare": lambda sources, _: find_or_write_tokens(sources, replace(PREPARE, max_length=70)),
    "choose": lambda sources, _: choose.fn(sources, "tiny", "rows", PREPARE, None, 0.2),
    "load_weights": lambda sources, _: check_weights(sources.weights, "tiny"),
    "train": lambda _, training: train.fn(None, training, "cpu", 0.0),  # type: ignore[arg-type]
    "evaluate": lambda _, training: evaluate.fn(None, training, CHECKPOINT, None, "cpu", 0.0),  # type: ignore[arg-type]
    "publish": lambda _, training: export(training, CHECKPOINT, Path("no"), ""),
}
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights, a bit": (lambda d: _flip(d / "model.safetensors"), "model.safetensors"),
    "weights, NaN": (_nan, "model.safetensors"),
    "config, a bit": (lambda d: _flip(d / "config.json"), "config.json"),
    "tokenizer, two entries": (_swap_entries, "tokenizer.json"),
    "tokenizer, settings": (lambda d: _flip(d / "tokenizer_config.json"), "tokenizer_config.json"),
}


READS = {"prepare": {"config", "tokenizer"}, "choose": {"config", "tokenizer"}, "load_weights": {"config"}}


@pytest.mark.parametrize(
    ("loading", "change"),
    [
        (loading, change)
        for loading in LOADINGS
        for change in CHANGES
        if loading not in READS or change.split(",")[0] in READS[loading]
    ],
)
def test_a_change_in_mid_run_ends_it(
    base: Path, sources: Sources, training: TrainingRef, loading: str, change: str
) -> None:
    """Between download and each later step that reads the file."""
    spoil, name = CHANGES[change]
    spoil(base)
    with disable_run_logger(), pytest.raises(ChangedFileError, match=rf"{name} has changed since this run began"):
        LOADINGS[loading](sources, training)


def test_unchanged_files_load(training: TrainingRef) -> None:
    network, tokenizer = load_frozen(training.model, training.plan, torch.device("cpu"), torch.float32)
    assert (network.config.n_layer, len(tokenizer)) == (6, 4096)


def test_the_identity_of_the_base_is_what_it_was(sources: Sources) -> None:
    """sha256 over name and sha256 of config and weights: trainings of older releases are found again."""
    names = ("config.json", "model.safetensors")
    want = sha256_json({name: sha256_file(EMBEDDED_BASE / name) for name in names})
    assert check_weights(sources.weights, "tiny").sha256 == want
    assert check_weights(_find(None), "tiny").sha256 == want
