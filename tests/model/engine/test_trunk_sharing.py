"""Trainings in one process that hand on the outputs of the frozen blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPTModel, freeze_bottom_layers
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.trainer import NonFiniteError, Trainer
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.engine.trunk_sharing import SharedTrunks
from model.files import sha256_file

CONFIG: dict[str, Any] = {"epochs": 2, "batch_size": 8, "eval_freq": 4, "precision": "fp32"}
IDENTITY = "0" * 64


def _model(gpt2_dir: Path, blocks: int = 1) -> GPTModel:
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, blocks)
    return model


def _files(directory: Path) -> dict[str, str]:
    """The checkpoints' hashes, and the losses of the journal, which has speeds too."""
    found = {str(path.relative_to(directory)): sha256_file(path) for path in directory.rglob("*.safetensors")}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["metrics"].get("train/loss"), line["metrics"].get("eval/loss")) for line in lines]
    return found | {"losses": str(losses)}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass through the frozen blocks."""
    passes: list[int] = []
    trunk = Engine.trunk

    def counted(self: Engine, batch: Any) -> torch.Tensor:
        passes.append(len(batch.ids))
        return trunk(self, batch)

    monkeypatch.setattr(Engine, "trunk", counted)
    return passes


@pytest.mark.parametrize("changes", [{"learning_rate": 0.01}, {"dropout": 0.2}, {"batch_size": 5, "epochs": 3}])
def test_a_second_training_equals_one_alone_and_computes_no_trunk(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, computed: list[int], changes: dict[str, Any]
) -> None:
    """Bit for bit: losses, weights and moments, whatever the training before it did."""
    second = TrainConfig(**{**CONFIG, **changes})
    train(_model(gpt2_dir), token_dir, second, tmp_path / "alone", IDENTITY, cache=TrunkCacheConfig())
    model, cache = _model(gpt2_dir), TrunkCacheConfig(shared=SharedTrunks())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, token_dir, TrainConfig(**CONFIG), tmp_path / "first", IDENTITY, cache=cache)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(base[name])
        parameter.grad = None
    computed.clear()
    result = train(model, token_dir, second, tmp_path / "second", IDENTITY, cache=cache)
    assert computed == []
    assert result.trunk_hit_share == 1
    assert _files(tmp_path / "second") == _files(tmp_path / "alone")
    assert _files(tmp_path / "second") != _files(tmp_path / "first")


def test_a_training_that_diverged_leaves_nothing_behind(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, computed: list[int]
) -> None:
    """The next one equals one alone, and uses the outputs again."""
    train(_model(gpt2_dir), token_dir, TrainConfig(**CONFIG), tmp_path / "alone", IDENTITY, cache=TrunkCacheConfig())
    model, cache = _model(gpt2_dir), TrunkCacheConfig(shared=SharedTrunks())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    diverging = TrainConfig(**{**CONFIG, "learning_rate": 1e30, "warmup_ratio": 0.0})
    with pytest.raises(NonFiniteError):
        train(model, token_dir, diverging, tmp_path / "first", IDENTITY, cache=cache)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(base[name])
        parameter.grad = None
    computed.clear()
    train(model, token_dir, TrainConfig(**CONFIG), tmp_path / "second", IDENTITY, cache=cache)
    assert len(computed) <= 1, "the first chunks are used again"
    assert _files(tmp_path / "second") == _files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"learning_rate": 0.01, "seed": 8, "max_steps": 3}, True),
        ({"dropout": 0.1}, False),
        ({"batch_size": 5}, False),
        ({"micro_batch_tokens": 64}, False),
        ({"precision": "bf16"}, False),
    ],
)
def test_an_engine_is_handed_on_only_if_its_graphs_fit(
    gpt2_dir: Path,
    token_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    same: bool,
) -> None:
    """A rate of dropout and a dtype are constants of a graph, and other passes need other graphs. A seed is not."""
    engines: list[Engine] = []
    train_steps = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (engines.append(self.engine), train_steps(self)))
    first = {**CONFIG, "dropout": 0.3, "micro_batch_tokens": 128}
    second = TrainConfig(**{**first, **changes})
    train(_model(gpt2_dir), token_dir, second, tmp_path / "alone", IDENTITY, cache=TrunkCacheConfig())
    model, cache = _model(gpt2_dir), TrunkCacheConfig(shared=SharedTrunks())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, token_dir, TrainConfig(**first), tmp_path / "first", IDENTITY, cache=cache)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(base[name])
        parameter.grad = None
    train(model, token_dir, second, tmp_path / "second", IDENTITY, cache=cache)
    _, before, after = engines
    assert (before is after) == same
    assert _files(tmp_path / "second") == _files(tmp_path / "alone")


@pytest.mark.parametrize(
    "changes", [{"micro_batch_tokens": 64}, {"precision": "bf16"}, {"prompt_loss_weight": 0.1}, {"epochs": 1}]
)
def test_outputs_are_handed_on_only_if_they_would_be_computed_alike(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, computed: list[int], changes: dict[str, Any]
) -> None:
    """Other passes, dtypes and rows are computed anew, and a training of one epoch would keep none on a GPU."""
    model, cache = _model(gpt2_dir), TrunkCacheConfig(shared=SharedTrunks())
    train(model, token_dir, TrainConfig(**CONFIG), tmp_path / "first", IDENTITY, cache=cache)
    computed.clear()
    train(model, token_dir, TrainConfig(**{**CONFIG, **changes}), tmp_path / "second", IDENTITY, cache=cache)
    assert computed


def test_another_model_gets_none_of_them(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, computed: list[int]
) -> None:
    """The same rows below another depth are other outputs."""
    cache = TrunkCacheConfig(shared=SharedTrunks())
    train(_model(gpt2_dir), token_dir, TrainConfig(**CONFIG), tmp_path / "first", IDENTITY, cache=cache)
    train(_model(gpt2_dir, 2), token_dir, TrainConfig(**CONFIG), tmp_path / "alone", IDENTITY)
    computed.clear()
    train(_model(gpt2_dir, 2), token_dir, TrainConfig(**CONFIG), tmp_path / "second", IDENTITY, cache=cache)
    assert computed
    assert _files(tmp_path / "second") == _files(tmp_path / "alone")
