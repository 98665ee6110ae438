"""The optimizer's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from model import GPTModel
from model.engine.config import TrainConfig
from model.engine.stepper import build_optimizer, learning_rate_at


def test_optimizer_holds_the_trainable_alone_in_two_groups(tiny_model: GPTModel) -> None:
    """It has no frozen parameters; biases and norms have no weight decay."""
    optimizer = build_optimizer(tiny_model, TrainConfig(weight_decay=0.1, learning_rate=3e-4))
    decayed, plain = optimizer.groups
    assert (decayed.weight_decay, plain.weight_decay, optimizer.learning_rate) == (0.1, 0.0, 3e-4)
    names = {p: name for name, p in tiny_model.named_parameters()}
    assert {names[p] for p in decayed.parameters} == {
        f"h.2.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert len(plain.parameters) == 10
    together = {names[p] for group in optimizer.groups for p in group.parameters}
    assert together == {name for name, p in tiny_model.named_parameters() if p.requires_grad}


def test_schedule() -> None:
    """Three warm-up steps out of a hundred, then a cosine from the peak towards zero."""
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.03)
    lr = [learning_rate_at(step, 100, config) for step in range(100)]
    assert lr[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert lr[3 + 97 // 3] == pytest.approx(0.5 * (1 + math.cos(math.pi * 32 / 97)))
    assert lr[51] == pytest.approx(0.5, abs=0.01)
    assert lr[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 96 / 97)))
    assert 0 < lr[99] < 0.001
    assert all(a > b for a, b in pairwise(lr[3:]))


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.03), (1, 0.0), (5, 0.0), (5, 1.0), (2, 0.5)])
def test_schedule_of_few_steps(steps: int, ratio: float) -> None:
    """No division by zero, and never a learning rate of zero or above the peak."""
    config = TrainConfig(learning_rate=2.0, warmup_ratio=ratio)
    assert all(0 < learning_rate_at(step, steps, config) <= 2.0 for step in range(steps))
