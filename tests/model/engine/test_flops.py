"""Necessary operations against torch's own count; the measured ceiling is a plausible number."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import GPTConfig, GPTModel, freeze_bottom_layers
from model.engine.flops import matmul_ceiling, necessary_flops

SHAPE = GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=64)


def test_355m_by_hand() -> None:
    """20 frozen and 4 trained blocks of D = 1024, V = 50257: trunk, top and head count their own tokens."""
    config = GPTConfig.preset("355m")
    assert necessary_flops(config, 20, 0, 0, 1) == pytest.approx(503e6, rel=1e-3)
    prompt = necessary_flops(config, 20, 1, 0, 0)
    assert prompt == (6 * (3 * 12 + 3) - 2 * 3) * 2**20  # three of four blocks, and c_attn of the last
    assert necessary_flops(config, 20, 1, 1, 0) - prompt == pytest.approx(54 * 2**20 + 206e6, rel=1e-3)
    head = 2 * 1024 * 50257
    assert necessary_flops(config, 20, 1, 1, 0, train_head=True) == necessary_flops(config, 20, 1, 1, 0) + head
    assert necessary_flops(config, 0, 1, 1, 0) == 6 * 24 * 12 * 2**20 + 2 * head  # nothing is frozen
    trunk = necessary_flops(config, 20, 100, 70, 100) - necessary_flops(config, 20, 100, 70, 0)
    assert trunk == 100 * 40 * 12 * 2**20


@pytest.mark.parametrize("train_head", [False, True])
def test_agrees_with_what_torch_counts(train_head: bool) -> None:
    """torch's counter finds the same operations in the linear layers of a forward and backward pass, and one more.

    That one is the product that gives the gradient of the lowest trained norm's output.
    """
    model = GPTModel(SHAPE)
    freeze_bottom_layers(model, 2, train_head)
    ids = torch.randint(SHAPE.vocab_size, (2, 8))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    linear = sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if str(operation) in ("aten.mm", "aten.addmm")
    )
    to_the_norm = 2 * 3 * SHAPE.n_embd**2 * ids.numel()
    assert linear == necessary_flops(SHAPE, 1, ids.numel(), ids.numel(), ids.numel(), train_head) + to_the_norm


def test_ceiling_is_quick_and_finite() -> None:
    """Well under a second even on one thread."""
    start = time.perf_counter()
    ceiling = matmul_ceiling(torch.device("cpu"), torch.float32)
    assert math.isfinite(ceiling)
    assert ceiling > 1e8
    assert time.perf_counter() - start < 5


def test_measuring_draws_nothing() -> None:
    """The measurement does not change the global random state, and so not the noise of dropout."""
    state = torch.get_rng_state()
    matmul_ceiling(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
