"""Dynamic loss scaling, and training in fp16. On a GPU the same code runs in test_cuda.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import GPTModel, freeze_bottom_layers
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.journal import read_journal
from model.engine.loss_scale import LossScale
from model.engine.trainer import NonFiniteError, StepReport, TrainResult
from model.engine.training import train
from model.net.device import cast_frozen

CONFIG = TrainConfig(
    epochs=2, batch_size=8, micro_batch_tokens=150, learning_rate=3e-3, eval_freq=4, precision="fp16"
)
CPU = torch.device("cpu")
Run = Callable[..., tuple[list[dict[str, float]], TrainResult]]


def yes(value: bool) -> Tensor:
    return torch.tensor(value)


def test_the_scale_halves_at_overflow_and_doubles_after_2000_good_steps() -> None:
    """By hand, with the count of skipped steps."""
    scale = LossScale(CPU)
    assert scale.scale.item() == 65536
    scale.update(yes(True))
    scale.update(yes(True))
    assert (scale.scale.item(), scale.skipped.item()) == (16384, 2)
    for _ in range(1999):
        scale.update(yes(False))
    assert scale.scale.item() == 16384
    scale.update(yes(True))  # starts the count anew
    for _ in range(1999):
        scale.update(yes(False))
    assert scale.scale.item() == 8192
    scale.update(yes(False))
    assert (scale.scale.item(), scale.skipped.item()) == (16384, 3)


@pytest.fixture
def run(gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> Run:
    """run(directory, ..., **settings): metrics of each step, and the result."""

    def start(name: str, on_step: Callable[[StepReport], None] = lambda report: None, **settings: Any) -> Any:
        config = replace(CONFIG, **settings)
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, 1)
        if config.precision == "fp16":
            cast_frozen(model, torch.float16)
        result = train(model, token_dir, config, tmp_path / name, "me", on_step)
        lines = [line["metrics"] for line in read_journal(tmp_path / name / "metrics.jsonl")]
        return [metrics for metrics in lines if "train/loss" in metrics], result

    return start


def test_fp16_learns_as_fp32(run: Run) -> None:
    """Losses agree within fp16's rounding, no step is skipped, and the scale is in the journal."""
    half, result = run("half")
    full, want = run("full", precision="fp32")
    assert [metrics["train/loss"] for metrics in half] == pytest.approx(
        [metrics["train/loss"] for metrics in full], rel=5e-3
    )
    assert [metrics["train/grad_norm"] for metrics in half] == pytest.approx(
        [metrics["train/grad_norm"] for metrics in full], rel=5e-2
    )
    assert result.best_eval_loss == pytest.approx(want.best_eval_loss, rel=5e-3)
    assert {(m["train/loss_scale"], m["train/skipped_steps"]) for m in half} == {(65536, 0)}
    assert "train/loss_scale" not in full[0]


def overflow_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the gradients of these steps infinite, as an overflow in the backward pass does."""
    original, started = Engine.forward_backward, [0]
    start_step = Engine.start_step

    def remember(self: Engine, step: int) -> None:
        started[0] = step
        start_step(self, step)

    def forward_backward(self: Engine, x: Tensor, batch: Any, loss: Any, first: bool = False) -> Tensor:
        def larger(hidden: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = loss(hidden)
            return value, gradient * math.inf if started[0] in steps else gradient

        return original(self, x, batch, larger, first)

    monkeypatch.setattr(Engine, "start_step", remember)
    monkeypatch.setattr(Engine, "forward_backward", forward_backward)


def test_an_overflow_skips_the_step_and_training_recovers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of twelve are skipped and counted; model and moments stay as they were in them."""
    overflow_at(monkeypatch, {2, 5})
    lines, result = run("overflow")
    assert [metrics["train/skipped_steps"] for metrics in lines] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert [metrics["train/loss_scale"] for metrics in lines][::5] == [65536, 16384, 16384]
    assert ["train/grad_norm" in metrics for metrics in lines] == [step not in (2, 5) for step in range(12)]
    assert all(math.isfinite(metrics["train/loss"]) for metrics in lines)
    assert result.best_eval_loss < result.base_eval_loss


def test_a_skipped_step_changes_nothing(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights before and after the skipped step are equal; those after the next one are not."""
    overflow_at(monkeypatch, {2})
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    cast_frozen(model, torch.float16)
    weights: dict[int, Tensor] = {}

    def watch(report: StepReport) -> None:
        weights[report.step] = model.h[2].mlp.c_fc.weight.detach().clone()

    train(model, token_dir, replace(CONFIG, max_steps=4), tmp_path, "me", watch)
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[3], weights[4])


def test_gradients_that_no_scale_saves_end_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seventeen halvings of 65,536 lead below 1: the training ends with the remedy."""
    overflow_at(monkeypatch, set(range(100)))
    with pytest.raises(NonFiniteError, match=r"gradient norm (inf|nan) at step 17: .*use precision=fp32"):
        run("hopeless", epochs=4)


class Stop(Exception):
    """Ends a training as a kill between two steps does."""


@pytest.mark.parametrize("step", [1, 5, 9])
def test_resumed_equals_uninterrupted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """With dropout, and an overflow before and after the cut: scale, counts, losses and weights, bit for bit."""
    overflow_at(monkeypatch, {2, 6})

    def cut(report: StepReport) -> None:
        if report.step == step:
            raise Stop

    settings = {"dropout": 0.1}
    with pytest.raises(Stop):
        run("cut", cut, **settings)
    resumed, result = run("cut", **settings)
    whole, _ = run("whole", **settings)
    assert result.resumed_from == step // 4 * 4
    untimed = {"train/loss", "train/grad_norm", "train/loss_scale", "train/skipped_steps"}
    for mine, theirs in zip(resumed, whole, strict=True):
        assert {name: mine[name] for name in untimed & mine.keys()} == {
            name: theirs[name] for name in untimed & theirs.keys()
        }
    for file in ("model.safetensors", "trainer.safetensors"):
        name = f"step-{len(whole):08d}/{file}"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
