"""Trainings in one process that hand on CUDA graphs. Skipped without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.engine import engine as engine_module
from model.engine.config import TrainConfig
from model.engine.trainer import NonFiniteError
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.engine.trunk_sharing import SharedTrunks
from model.files import sha256_file
from model.net.config import GPTConfig
from model.net.device import cast_frozen, resolve_precision
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel
from ops.machine.stopping import run_stoppable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG: dict[str, Any] = {"epochs": 3, "batch_size": 8, "eval_freq": 5, "learning_rate": 1e-3}


def base_model(precision: str) -> GPTModel:
    """A GPT-2 with heads of width 64, like the real sizes; all but its top two blocks are frozen."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPTModel(GPTConfig(vocab_size=320, n_positions=512, n_embd=128, n_layer=4, n_head=2))
    freeze_bottom_layers(model, 2)
    cast_frozen(model, resolve_precision(precision, torch.device("cuda")))
    return model


def files(directory: Path) -> dict[str, str]:
    """The checkpoints' hashes, and the losses of the journal, which has speeds too."""
    found = {str(path.relative_to(directory)): sha256_file(path) for path in directory.rglob("*.safetensors")}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/grad_norm", "eval/loss")
    return found | {"losses": str([[line["step"], *map(line["metrics"].get, names)] for line in lines])}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Size, predictors and kind of each graph that is captured."""
    made: list[tuple[Any, ...]] = []
    capture = engine_module._Graph.__init__

    def counted(self: Any, top: Any, masters: Any, *key_and_rest: Any) -> None:
        made.append(key_and_rest[:3])
        capture(self, top, masters, *key_and_rest)

    monkeypatch.setattr(engine_module._Graph, "__init__", counted)
    return made


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "tf32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("changes", [{"learning_rate": 3e-3}, {"learning_rate": 3e-3, "seed": 9, "epochs": 2}])
def test_a_training_with_reused_graphs_equals_one_with_its_own(
    token_dir: Path,
    tmp_path: Path,
    captured: list[tuple[Any, ...]],
    precision: str,
    dropout: float,
    changes: dict[str, Any],
) -> None:
    """Bit for bit: losses, gradient norms, weights and moments. Each training has a thread of its own, as in a sweep.

    Between the two, memory that nobody holds is overwritten: a graph that used it would compute something else.
    """
    first = TrainConfig(**CONFIG, precision=precision, dropout=dropout)  # type: ignore[arg-type]
    second = TrainConfig(**{**CONFIG, **changes}, precision=precision, dropout=dropout)  # type: ignore[arg-type]

    def run(model: GPTModel, config: TrainConfig, name: str, cache: TrunkCacheConfig) -> list[tuple[Any, ...]]:
        captured.clear()
        work: Callable[..., Any] = lambda stop: train(model, token_dir, config, tmp_path / name, "x", cache=cache)  # noqa: E731
        run_stoppable(work)
        return list(captured)

    alone = run(base_model(precision), second, "alone", TrunkCacheConfig())
    model, cache = base_model(precision), TrunkCacheConfig(shared=SharedTrunks())
    loaded = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    run(model, first, "first", cache)
    assert cache.shared is not None
    assert cache.shared._engine is not None
    kept = {*cache.shared._engine[1]._graphs}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(loaded[name])
        parameter.grad = None
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    garbage = [torch.full((size,), 1e30, device="cuda") for size in (free // 16, *[1 << 14] * 200, *[128] * 2000)]
    torch.cuda.synchronize()
    del garbage
    after = run(model, second, "second", cache)
    assert kept
    assert not kept & {*after}, "graphs of the training before are used again"
    assert len(after) < len(alone)
    assert files(tmp_path / "second") == files(tmp_path / "alone")
    assert files(tmp_path / "second") != files(tmp_path / "first")


def test_graphs_of_a_training_that_diverged_serve_the_next(token_dir: Path, tmp_path: Path) -> None:
    """No NaN is left in what they read: the next training equals one alone, bit for bit."""
    config = {**CONFIG, "precision": "bf16", "dropout": 0.1}
    train(base_model("bf16"), token_dir, TrainConfig(**config), tmp_path / "alone", "x")
    model, cache = base_model("bf16"), TrunkCacheConfig(shared=SharedTrunks())
    loaded = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError):
        train(
            model,
            token_dir,
            TrainConfig(**{**config, "learning_rate": 1e30, "warmup_ratio": 0.0}),
            tmp_path / "first",
            "x",
            cache=cache,
        )
    assert cache.shared is not None
    assert cache.shared._engine is not None
    diverged = cache.shared._engine[1]
    assert diverged.keeps_gradients
    for name, parameter in model.named_parameters():
        parameter.data.copy_(loaded[name])
        parameter.grad = None
    train(model, token_dir, TrainConfig(**config), tmp_path / "second", "x", cache=cache)
    assert cache.shared._engine[1] is diverged
    assert files(tmp_path / "second") == files(tmp_path / "alone")


def test_replaced_gradients_are_refused(token_dir: Path, tmp_path: Path) -> None:
    """Graphs would go on to write to the memory of the old ones."""
    model, cache = base_model("bf16"), TrunkCacheConfig(shared=SharedTrunks())
    config = TrainConfig(**CONFIG, precision="bf16")

    def replace(report: Any) -> None:
        for parameter in model.parameters():
            if report.step == 6 and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    with pytest.raises(RuntimeError, match=r"^gradients were replaced, and CUDA graphs write to those of before"):
        train(model, token_dir, config, tmp_path, "x", on_step=replace, cache=cache)
