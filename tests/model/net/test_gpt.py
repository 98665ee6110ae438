"""The architecture equals transformers' GPT2LMHeadModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPTConfig, GPTModel
from model.net.attention import Rows
from model.net.loading import PREFIX, is_conv1d

WIDTHS = [  # n_embd, n_head
    pytest.param(768, 12, id="768 wide, as 124M"),
    pytest.param(75, 5, id="75 wide, 5 heads"),
    pytest.param(48, 1, id="48 wide, 1 head"),
]


@pytest.mark.parametrize(("n_embd", "n_head"), WIDTHS)
def test_logits_equal_transformers(random_hf: Callable[..., Any], tmp_path: Path, n_embd: int, n_head: int) -> None:
    """Covers qkv bias, tanh-GELU, epsilon, head split and orientation: every bias and norm weight is random."""
    reference = random_hf(n_embd=n_embd, n_head=n_head, n_layer=2, n_positions=64, vocab_size=500)
    reference.save_pretrained(tmp_path)
    model = GPTModel.from_pretrained(tmp_path)
    ids = torch.randint(500, (3, 64))
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_layer_norm_epsilon_is_the_files(random_hf: Callable[..., Any], tmp_path: Path, epsilon: float) -> None:
    """Embeddings so small that the epsilon dominates the variance."""
    reference = random_hf(
        n_embd=32, n_head=2, n_layer=2, n_positions=16, vocab_size=50, noise=0.002, initializer_range=0.002,
        layer_norm_epsilon=epsilon,
    )  # fmt: skip
    reference.save_pretrained(tmp_path)
    ids = torch.randint(50, (2, 16))
    with torch.no_grad():
        difference = GPTModel.from_pretrained(tmp_path)(ids) - reference(ids).logits
    assert difference.abs().max() <= 1e-6


def test_parity_test_finds_a_transposed_square_weight(random_hf: Callable[..., Any], tmp_path: Path) -> None:
    """attn.c_proj.weight is square, so only the logits can show that it is transposed."""
    reference = random_hf(n_embd=75, n_head=5, n_layer=2, n_positions=32, vocab_size=100)
    ids = torch.randint(100, (2, 32))
    with torch.no_grad():
        right = reference(ids).logits
        reference.transformer.h[0].attn.c_proj.weight.copy_(reference.transformer.h[0].attn.c_proj.weight.t().clone())
        reference.save_pretrained(tmp_path)
        assert (GPTModel.from_pretrained(tmp_path)(ids) - right).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("size", "total"),
    [("124m", 124_439_808), ("355m", 354_823_168), ("774m", 774_030_080), ("1558m", 1_557_611_200)],
)
def test_every_size_has_transformers_shapes(size: str, total: int) -> None:
    """Names, shapes and totals, the tied head counted once (124M is not 163M)."""
    config = GPTConfig.preset(size)
    with torch.device("meta"):
        model = GPTModel(config)
        reference = GPT2LMHeadModel(GPT2Config(n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head))
    expected = {
        name.removeprefix(PREFIX): tuple(p.shape)[::-1] if is_conv1d(name) else tuple(p.shape)
        for name, p in reference.named_parameters()
    }
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters()) == total


def test_no_token_sees_a_later_one() -> None:
    """With right padding and a causal mask, later tokens never change a token's logits."""
    model = GPTModel(GPTConfig(50, 16, 32, 2, 2)).eval()
    ids = torch.randint(50, (1, 12))
    changed = ids.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :8], model(changed)[:, :8], atol=1e-6, rtol=0)
        torch.testing.assert_close(model(ids)[:, :8], model(ids[:, :8]), atol=1e-6, rtol=0)
        assert not torch.allclose(model(ids)[:, 8:], model(changed)[:, 8:], atol=1e-3)


def test_text_beyond_the_context_is_refused() -> None:
    """Positions are never reused or silently clamped in training."""
    model = GPTModel(GPTConfig(50, 16, 32, 2, 2))
    with pytest.raises(ValueError, match="17 tokens do not fit the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_initialisation_is_gpt2s() -> None:
    """Training from scratch starts from N(0, 0.02), residual projections divided by sqrt(2 layers)."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(2000, 64, 128, 8, 4))
    parameters = dict(model.named_parameters())
    for name, std in {"wte.weight": 0.02, "h.3.mlp.c_fc.weight": 0.02, "h.3.mlp.c_proj.weight": 0.005}.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.05)
    assert not parameters["h.3.attn.c_attn.bias"].any()
    assert (parameters["h.3.ln_1.weight"] == 1).all()


def test_dropout_acts_in_attention_and_mlp_and_only_in_training() -> None:
    """set_dropout acts after attention, projection and MLP in training mode, and nowhere in eval mode."""
    model = GPTModel(GPTConfig(50, 16, 32, 1, 2))
    ids = torch.randint(50, (4, 16))
    want = model.eval()(ids)
    model.set_dropout(0.5)
    assert model.config.dropout == 0.5
    assert torch.equal(model(ids), want)
    block = model.train().h[0]
    x = torch.randn(4, 16, 32)
    assert not torch.equal(block.attn(x, Rows(), 0.5), block.attn(x, Rows(), 0.5))
    for silent, other in ((block.attn.c_proj, block.mlp.c_proj), (block.mlp.c_proj, block.attn.c_proj)):
        weights = [parameter.detach().clone() for parameter in silent.parameters()]
        torch.nn.init.zeros_(silent.weight)
        torch.nn.init.ones_(other.bias)
        assert (block(x, Rows()) == x).float().mean() == pytest.approx(0.5, abs=0.1)
        for parameter, weight in zip(silent.parameters(), weights, strict=True):
            parameter.data.copy_(weight)
        torch.nn.init.zeros_(other.bias)
    with pytest.raises(ValueError, match=r"dropout 1\.0"):
        model.set_dropout(1.0)
