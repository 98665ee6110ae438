"""The loss: next token, response and EOS only, summed over tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from model import GPTModel
from model.scoring import mean_loss, next_token_losses, row_losses, weighted_loss_sum
from model.tokens import IGNORE, CodeAlpacaDataset, collate_fn

SURE = 50.0  # a logit that makes its token certain


def certain(tokens: Tensor, vocabulary: int = 320) -> Tensor:
    return SURE * F.one_hot(tokens, vocabulary).float()


def copying(ids: Tensor) -> Tensor:
    """Logits that predict the token just read: what unshifted labels teach."""
    return certain(ids)


def foreseeing(ids: Tensor) -> Tensor:
    """Logits that predict the next token."""
    return certain(ids.roll(-1, dims=1))


def model_of(predict: Any) -> Any:
    return SimpleNamespace(hidden=predict, lm_head=nn.Identity())


@pytest.fixture(scope="module")
def batch(token_dir: Path) -> dict[str, Tensor]:
    dataset = CodeAlpacaDataset(token_dir, "train")
    return collate_fn([dataset[i] for i in range(8)])


def test_copying_the_input_scores_badly(batch: dict[str, Tensor]) -> None:
    """#1: with unshifted labels this would be 0, and the model ruined."""
    tokens = batch["loss_weights"].sum()
    assert weighted_loss_sum(model_of(copying), batch) / tokens > 0.7 * SURE


def test_predicting_the_next_token_scores_zero(batch: dict[str, Tensor]) -> None:
    """#1: position t predicts token t + 1."""
    assert weighted_loss_sum(model_of(foreseeing), batch) < 1e-3


def test_never_stopping_costs(batch: dict[str, Tensor]) -> None:
    """#2, #3: a model that foresees all but the EOS pays for exactly one token a row."""

    def endless(ids: Tensor) -> Tensor:
        logits = foreseeing(ids)
        logits[..., 0] = -SURE  # id 0 is EOS, and padding
        return logits

    loss = weighted_loss_sum(model_of(endless), batch)
    ends = [weights.nonzero().max() for weights in batch["loss_weights"]]
    assert all(batch["labels"][row, end] == 0 for row, end in enumerate(ends))
    at_ends = sum(F.cross_entropy(endless(batch["input_ids"])[r, e - 1], torch.tensor(0)) for r, e in enumerate(ends))
    assert loss > 8 * SURE
    torch.testing.assert_close(loss, at_ends, atol=1e-2, rtol=0)


def test_padding_bears_no_loss(tiny_model: GPTModel, token_dir: Path) -> None:
    """#2: pad = eos, and still a row's loss is the same alone, padded, and beside others."""
    dataset = CodeAlpacaDataset(token_dir, "train")
    rows = [dataset[i] for i in range(6)]
    shortest, longest = sorted(rows, key=lambda row: len(row["input_ids"]))[:: len(rows) - 1]
    assert len(shortest["input_ids"]) + 15 < len(longest["input_ids"])
    with torch.no_grad():
        alone = [weighted_loss_sum(tiny_model, collate_fn([row])) for row in rows]
        torch.testing.assert_close(weighted_loss_sum(tiny_model, collate_fn(rows)), sum(alone))
    labels = collate_fn([shortest, longest])["labels"]
    losses, mask = next_token_losses(torch.randn(*labels.shape, 32), nn.Linear(32, 320), labels)
    targets = [int((row["labels"] != IGNORE).sum()) for row in (shortest, longest)]
    assert mask.sum(dim=1).tolist() == targets
    assert len(losses) == sum(targets)


def test_prompt_bears_no_loss_by_default(batch: dict[str, Tensor]) -> None:
    """#6: nonsense on the prompt costs nothing; the first response token is predicted from its last token."""
    response = batch["labels"] != IGNORE

    def nonsense_on_prompt(ids: Tensor) -> Tensor:
        logits = foreseeing(ids)
        predicts_response = F.pad(response[:, 1:], (0, 1))
        return torch.where(predicts_response[..., None], logits, -logits)

    assert weighted_loss_sum(model_of(nonsense_on_prompt), batch) < 1e-3


def test_prompt_loss_weight_weighs(tiny_model: GPTModel, token_dir: Path) -> None:
    """#6: the sum is response + weight x prompt."""

    def loss(weight: float) -> float:
        dataset = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
        with torch.no_grad():
            return weighted_loss_sum(tiny_model, collate_fn([dataset[i] for i in range(4)])).item()

    assert loss(1.0) > loss(0.0)
    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), rel=1e-5)


def test_batch_without_targets_is_zero(tiny_model: GPTModel, batch: dict[str, Tensor]) -> None:
    """Fault 18, trl#6668: not NaN, and its gradient is 0."""
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}
    loss = weighted_loss_sum(tiny_model, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_loss_is_computed_in_fp32(tiny_model: GPTModel, batch: dict[str, Tensor]) -> None:
    """#16: bf16 logits are widened before the softmax."""
    hidden = torch.randn(8, batch["labels"].size(1), 32, dtype=torch.bfloat16)
    losses, _ = next_token_losses(hidden, nn.Linear(32, 320, bias=False).bfloat16(), batch["labels"])
    assert losses.dtype == torch.float32


def reference_losses(gpt2_dir: Path, dataset: CodeAlpacaDataset) -> list[tuple[float, int]]:
    """Sum and number by transformers' own shifted loss, one unpadded row at a time, in float64."""
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
    """#8, #9: each row's loss is its own, in the rows' order, however the rows are grouped."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    sums, counts = row_losses(GPTModel.from_pretrained(gpt2_dir), dataset, torch.float32, max_tokens)
    want = reference_losses(gpt2_dir, dataset)
    assert counts.tolist() == [count for _, count in want]
    np.testing.assert_allclose(sums, [loss for loss, _ in want], rtol=1e-5)


def test_mean_is_over_tokens() -> None:
    """#9, torchtitan#4167: 100 nats over 11 tokens, not the mean of the rows' means."""
    assert mean_loss(np.array([90.0, 10.0]), np.array([10, 1])) == pytest.approx(100 / 11)


def test_scoring_restores_the_mode_and_ignores_dropout(tiny_model: GPTModel, token_dir: Path) -> None:
    """#8, #14: validation in the midst of training is not noised, and changes nothing."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    want, _ = row_losses(tiny_model, dataset, torch.float32, 500)
    tiny_model.set_dropout(0.5)
    tiny_model.train()
    state = torch.get_rng_state()
    got, _ = row_losses(tiny_model, dataset, torch.float32, 500)
    assert (got == want).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [block.training for block in tiny_model.h] == [False, False, True]
    assert all(p.grad is None for p in tiny_model.parameters())
