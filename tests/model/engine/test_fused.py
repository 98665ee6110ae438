"""Which blocks the fused kernels may replace. The kernels themselves are tested in test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import GPTModel
from model.data.packing import pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.fused import can_fuse, has_kernels, has_plain_layers
from model.net.config import GPTConfig
from model.net.gpt import MLP

CPU = torch.device("cpu")


class Adapted(nn.Linear):
    """A linear layer with an extra term, as a low-rank adapter adds one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x.mean(-1, keepdim=True)


class OtherNorm(nn.LayerNorm):
    """A subclass of the plain norm."""


class OtherMLP(MLP):
    """A subclass of the plain feed-forward network."""


def adapted(linear: nn.Linear) -> Adapted:
    """The layer with an adapter: the same weights, another forward pass."""
    other = Adapted(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def adapt_attention(model: GPTModel) -> None:
    model.h[2].attn.c_attn = adapted(model.h[2].attn.c_attn)


def adapt_mlp(model: GPTModel) -> None:
    model.h[2].mlp.c_proj = adapted(model.h[2].mlp.c_proj)


def replace_norm(model: GPTModel) -> None:
    model.h[2].ln_2 = OtherNorm(32)


def replace_mlp(model: GPTModel) -> None:
    model.h[2].mlp = OtherMLP(model.config)


@pytest.fixture(autouse=True)
def modern_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that Triton supports. Mocked, as these tests need no GPU."""
    monkeypatch.setattr("model.engine.fused.runs_triton", lambda device: True)


def test_kernels_need_a_gpu_that_triton_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an older GPU, PyTorch's own kernels run."""
    config = GPTConfig(vocab_size=320, n_positions=96, n_embd=128, n_layer=2, n_head=2)
    assert has_kernels(config, torch.device("cuda"), torch.float16)
    monkeypatch.setattr("model.engine.fused.runs_triton", lambda device: False)
    assert not has_kernels(config, torch.device("cuda"), torch.float16)


def test_kernels_need_a_gpu_and_known_dtypes_and_head_widths() -> None:
    """The part of the decision that concerns device and dtype."""
    cuda = torch.device("cuda")  # a name: no GPU is needed
    config = GPTConfig(vocab_size=320, n_positions=96, n_embd=128, n_layer=2, n_head=2)
    assert has_kernels(config, cuda, torch.bfloat16)
    assert not has_kernels(config, CPU, torch.bfloat16)
    assert has_kernels(config, cuda, torch.float16)
    assert has_kernels(config, cuda, torch.float32)
    assert not has_kernels(config, cuda, torch.float64)
    odd = GPTConfig(vocab_size=320, n_positions=96, n_embd=144, n_layer=2, n_head=3)
    assert not has_kernels(odd, cuda, torch.bfloat16)


@pytest.mark.parametrize("change", [adapt_attention, adapt_mlp, replace_norm, replace_mlp])
def test_changed_layers_are_not_fused(tiny_model: GPTModel, change: Callable[[GPTModel], None]) -> None:
    """A block with one changed layer is not fused; other blocks still are."""
    cuda, blocks = torch.device("cuda"), list(tiny_model.h)
    assert has_plain_layers(blocks, tiny_model.ln_f)
    assert can_fuse(tiny_model, blocks, tiny_model.ln_f, cuda, torch.bfloat16)
    change(tiny_model)
    assert not has_plain_layers(blocks, tiny_model.ln_f)
    assert not can_fuse(tiny_model, blocks, tiny_model.ln_f, cuda, torch.bfloat16)
    assert has_plain_layers(blocks[:2], None)


def test_changed_final_norm_is_not_fused(tiny_model: GPTModel) -> None:
    """A changed final norm matters only where it is computed together with the blocks."""
    tiny_model.ln_f = OtherNorm(32)
    assert not has_plain_layers(tiny_model.h, tiny_model.ln_f)
    assert has_plain_layers(tiny_model.h, None)


def test_adapter_is_not_skipped(tiny_model: GPTModel, token_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final hidden states with an adapter are the plain model's. Mocks a device that has the kernels."""
    batch = pack(CodeAlpacaDataset(token_dir, "train"), np.arange(8), CPU)
    engine = Engine(tiny_model.eval(), torch.float32)
    x = engine.trunk(batch)
    before = engine.top(x, batch)
    adapt_attention(tiny_model)
    monkeypatch.setattr("model.engine.fused.has_kernels", lambda *arguments: True)
    with torch.no_grad():
        got = Engine(tiny_model, torch.float32).top(x, batch)
        want = tiny_model.top(x, batch.documents)[batch.predictors]
    assert torch.equal(got, want)
    assert (got - before).abs().max() > 1e-3
