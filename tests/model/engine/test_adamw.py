"""AdamW against PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model.engine.adamw import AdamW, ParameterGroup


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bit_is_that_of_pytorch(dtype: torch.dtype) -> None:
    """Over steps with other learning rates, a parameter without a gradient, and an update that is skipped."""
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in [(5, 3), (7,), (2, 2)]] for _ in "ab"
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    optimizer = AdamW([ParameterGroup(ours[:1], 0.1), ParameterGroup(ours[1:], 0.0)], 0.0)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    skip = torch.zeros(())
    reference.found_inf = skip  # type: ignore[attr-defined]
    for step in range(6):
        optimizer.learning_rate = 10.0**-step
        for group in reference.param_groups:
            group["lr"] = 10.0**-step
        skip.fill_(step == 3)
        for mine, other in list(zip(ours, theirs, strict=True))[: 2 if step < 2 else 3]:
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        before = [parameter.detach().clone() for parameter in ours]
        optimizer.step(skip)
        reference.step()
        for mine, other, was in zip(ours, theirs, before, strict=True):
            assert torch.equal(mine, other)
            assert torch.equal(mine, was) == (step == 3 or mine.grad is None)
    for mine, other in zip(ours, theirs, strict=True):
        for kind, value in reference.state[other].items():
            assert torch.equal(optimizer.state[mine][kind], value), kind
            assert optimizer.state[mine][kind].dtype == value.dtype
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_no_compiler_is_imported() -> None:
    """A step, and loading a model, leave torch._dynamo alone, whose import takes seconds on a slow processor."""
    script = """
import sys, tempfile
from pathlib import Path
import torch
from model import GPTModel
from model.engine.config import TrainConfig
from model.engine.stepper import build_optimizer
from model.net.config import GPTConfig
from model.net.loading import read_pretrained
with tempfile.TemporaryDirectory() as directory:
    GPTModel(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)
    model = read_pretrained(Path(directory), torch.device("cpu"), torch.float32)
optimizer = build_optimizer(model, TrainConfig())
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
optimizer.step()
optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
