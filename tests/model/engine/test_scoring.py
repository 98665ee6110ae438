"""Scores of rows: each row's loss on its response, and the mean over tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from model import GPTModel
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.scoring import mean_loss, row_losses


def reference_losses(gpt2_dir: Path, dataset: CodeAlpacaDataset) -> list[tuple[float, int]]:
    """Summed loss and number of targets by transformers, one unpadded row at a time, in float64."""
    reference = GPT2LMHeadModel.from_pretrained(gpt2_dir).eval().double()
    results = []
    for i in range(len(dataset)):
        ids, prompt = dataset[i]["input_ids"], int(dataset.lengths[i, 1])
        with torch.no_grad():
            logits = reference(ids[None]).logits[0]
        losses = F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none")
        results.append((losses.sum().item(), len(ids) - prompt))
    return results


@pytest.mark.parametrize("max_tokens", [1, 200, 10_000])
def test_row_losses_equal_transformers(gpt2_dir: Path, token_dir: Path, max_tokens: int) -> None:
    """Losses are per row, in the order of the rows, however many rows share a pass."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    engine = Engine(GPTModel.from_pretrained(gpt2_dir), torch.float32)
    sums, counts = row_losses(engine, dataset, max_tokens)
    want = reference_losses(gpt2_dir, dataset)
    assert counts.tolist() == [count for _, count in want]
    np.testing.assert_allclose(sums, [loss for loss, _ in want], rtol=1e-5)


def test_mean_is_over_tokens() -> None:
    """torchtitan#4167: 100 nats over 11 tokens, not the mean of row means."""
    assert mean_loss(np.array([90.0, 10.0]), np.array([10, 1])) == pytest.approx(100 / 11)


def test_scoring_restores_the_mode_and_ignores_dropout(tiny_model: GPTModel, token_dir: Path) -> None:
    """A validation during the training has no dropout, and restores mode and random state."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    want, _ = row_losses(Engine(tiny_model, torch.float32), dataset, 500)
    tiny_model.set_dropout(0.5)
    tiny_model.train()
    state = torch.get_rng_state()
    got, _ = row_losses(Engine(tiny_model, torch.float32), dataset, 500)
    assert (got == want).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [block.training for block in tiny_model.h] == [False, False, True]
    assert all(p.grad is None for p in tiny_model.parameters())
