"""The loss: next token, response and EOS only, summed over tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPTModel
from model.data.packing import Pack, pack
from model.data.tokens import IGNORE, CodeAlpacaDataset
from model.engine import loss as loss_module
from model.engine.engine import Engine
from model.engine.loss import cross_entropy, head_loss, padded_head, token_losses

SURE = 50.0  # a logit that makes its token certain
VOCABULARY = 320
CPU = torch.device("cpu")


def certain(tokens: Tensor) -> Tensor:
    return SURE * F.one_hot(tokens, VOCABULARY).float()


def copying(ids: Tensor) -> Tensor:
    """Logits that predict the current token, as a model trained with unshifted labels."""
    return certain(ids)


def foreseeing(ids: Tensor) -> Tensor:
    """Logits that predict the next token."""
    return certain(ids.roll(-1))


def loss_of(predict: Callable[[Tensor], Tensor], dataset: CodeAlpacaDataset, rows: int = 8) -> Tensor:
    """Summed loss of the first rows with given logits; the head is the identity, so hidden states are logits."""
    batch = pack(dataset, np.arange(rows), CPU)
    logits = torch.cat([predict(dataset[i]["input_ids"])[:-1] for i in range(rows)])
    identity = torch.eye(VOCABULARY)
    total, _ = head_loss(logits[batch.predictors], identity, VOCABULARY, batch.targets, batch.weights)
    losses = token_losses(logits[batch.predictors], identity, VOCABULARY, batch.targets)
    torch.testing.assert_close(losses.double().sum(), total)
    return total


@pytest.fixture(scope="module")
def dataset(token_dir: Path) -> CodeAlpacaDataset:
    return CodeAlpacaDataset(token_dir, "train")


def test_copying_the_input_scores_badly(dataset: CodeAlpacaDataset) -> None:
    """Labels are shifted: copying the current token costs nearly the full loss at each token."""
    tokens = sum(dataset[i]["loss_weights"].sum() for i in range(8))
    assert loss_of(copying, dataset) / tokens > 0.7 * SURE


def test_predicting_the_next_token_scores_zero(dataset: CodeAlpacaDataset) -> None:
    """Position t predicts token t + 1."""
    assert loss_of(foreseeing, dataset) < 1e-3


def test_never_stopping_costs(dataset: CodeAlpacaDataset) -> None:
    """A model that predicts every token except EOS has a loss at exactly one token per row."""

    def endless(ids: Tensor) -> Tensor:
        logits = foreseeing(ids)
        logits[..., 0] = -SURE  # id 0 is EOS, and would be the padding
        return logits

    loss = loss_of(endless, dataset)
    rows = [dataset[i]["input_ids"] for i in range(8)]
    assert all(ids[-1] == 0 for ids in rows)
    at_ends = sum(F.cross_entropy(endless(ids)[-2], torch.tensor(0)) for ids in rows)
    assert loss > 8 * SURE
    torch.testing.assert_close(loss.float(), at_ends, atol=1e-2, rtol=0)


def packed_loss(model: GPTModel, dataset: CodeAlpacaDataset, rows: list[int]) -> Tensor:
    """Summed loss of rows packed together."""
    engine, batch = Engine(model, torch.float32), pack(dataset, np.array(rows), CPU)
    with torch.no_grad():
        hidden = engine.top(engine.trunk(batch), batch)
    head = padded_head(model.lm_head.weight, torch.float32)
    return head_loss(hidden, head, VOCABULARY, batch.targets, batch.weights)[0]


def test_padding_bears_no_loss(tiny_model: GPTModel, dataset: CodeAlpacaDataset) -> None:
    """With pad = eos a row has the same loss alone, padded, and packed with others."""
    numbers = list(range(6))
    rows = [dataset[i] for i in numbers]
    shortest, longest = sorted(numbers, key=lambda i: len(rows[i]["input_ids"]))[:: len(rows) - 1]
    assert len(rows[shortest]["input_ids"]) + 15 < len(rows[longest]["input_ids"])
    together, alone = (
        packed_loss(tiny_model, dataset, numbers),
        [packed_loss(tiny_model, dataset, [i]) for i in numbers],
    )
    torch.testing.assert_close(together, torch.stack(alone).sum())
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        for key, value in (("input_ids", 0), ("labels", IGNORE))
    )
    with torch.no_grad():
        padded = F.cross_entropy(
            tiny_model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
    torch.testing.assert_close(together.float(), padded)
    batch = pack(dataset, np.array([shortest, longest]), CPU)
    losses = token_losses(torch.randn(len(batch.targets), 32), torch.randn(320, 32), VOCABULARY, batch.targets)
    targets = [int((rows[i]["labels"] != IGNORE).sum()) for i in (shortest, longest)]
    assert np.bincount(batch.owner).tolist() == targets
    assert len(losses) == sum(targets)


def test_prompt_bears_no_loss_by_default(dataset: CodeAlpacaDataset) -> None:
    """Wrong predictions within the prompt cost nothing; the prompt's last token predicts the first response token."""
    prompts = {tuple(dataset[i]["input_ids"].tolist()): int(dataset.lengths[i, 1]) for i in range(8)}

    def nonsense_on_prompt(ids: Tensor) -> Tensor:
        logits = foreseeing(ids)
        predicts_response = torch.arange(len(ids)) >= prompts[tuple(ids.tolist())] - 1
        return torch.where(predicts_response[:, None], logits, -logits)

    assert loss_of(nonsense_on_prompt, dataset) < 1e-3


def test_prompt_loss_weight_weighs(tiny_model: GPTModel, token_dir: Path) -> None:
    """The loss is response + weight x prompt."""

    def loss(weight: float) -> float:
        weighted = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
        return packed_loss(tiny_model, weighted, [0, 1, 2, 3]).item()

    assert loss(1.0) > loss(0.0)
    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), rel=1e-5)


def test_batch_without_targets_is_zero(tiny_model: GPTModel, dataset: CodeAlpacaDataset) -> None:
    """trl#6668: the loss is 0, not NaN, and so are the gradients."""
    none = torch.empty(0, dtype=torch.long)
    empty = replace(pack(dataset, np.arange(8), CPU), predictors=none, targets=none)
    engine, head = Engine(tiny_model, torch.float32), padded_head(tiny_model.lm_head.weight, torch.float32)
    loss = engine.forward_backward(
        engine.trunk(empty), empty, lambda hidden: head_loss(hidden, head, VOCABULARY, empty.targets)
    )
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_loss_is_computed_in_fp32(dataset: CodeAlpacaDataset) -> None:
    """Logits in bf16 are converted to fp32 before the softmax."""
    batch: Pack = pack(dataset, np.arange(8), CPU)
    hidden = torch.randn(len(batch.targets), 32, dtype=torch.bfloat16)
    head = torch.randn(VOCABULARY, 32, dtype=torch.bfloat16)
    logits = hidden @ head.t()
    want = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    assert token_losses(hidden, head, VOCABULARY, batch.targets).dtype == torch.float32
    torch.testing.assert_close(token_losses(hidden, head, VOCABULARY, batch.targets), want)
    losses, _ = cross_entropy(logits, batch.targets, VOCABULARY)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, want)


# Cross-entropy and its gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("vocabulary", [320, 301, 65])
def test_cross_entropy_equals_autograd(
    dtype: torch.dtype, tolerance: float, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients equal torch's for any number of rows at a time, and exclude the vocabulary's padding."""
    monkeypatch.setattr("model.engine.loss._ROWS", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    logits = (4 * torch.randn(50, vocabulary, dtype=dtype)).requires_grad_()
    targets = torch.randint(vocabulary, (50,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    want = F.cross_entropy(logits, targets, reduction="none")
    [gradient] = torch.autograd.grad(want.sum(), logits)
    padded = F.pad(logits.detach(), (0, -vocabulary % 64))
    losses, got = cross_entropy(padded, targets, vocabulary)
    torch.testing.assert_close(losses, want.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[:, :vocabulary], gradient, atol=tolerance, rtol=tolerance)
    assert got.shape == padded.shape
    assert not got[:, vocabulary:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_head_loss_equals_autograd(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, with weights, with the gradient of the head's weight, and a vocabulary that is no multiple of 64."""
    monkeypatch.setitem(loss_module._CHUNK, "cpu", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16, dtype=dtype), torch.randn(301, 16, dtype=dtype)
    targets, weights = torch.randint(301, (30,)), torch.rand(30, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = (F.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="none") * weights).sum()
    gradients = torch.autograd.grad(want, leaves)
    head_gradient = torch.ones_like(weight)  # the gradient is added to it
    total, gradient = head_loss(hidden, padded_head(weight, dtype), 301, targets, weights, head_gradient)
    assert total.item() == pytest.approx(want.item(), rel=tolerance)
    torch.testing.assert_close(gradient, gradients[0], atol=10 * tolerance, rtol=tolerance)
    torch.testing.assert_close(head_gradient - 1, gradients[1], atol=10 * tolerance, rtol=tolerance)


def test_sure_target_keeps_its_gradient_in_bf16() -> None:
    """p - 1 is computed before rounding: in bf16 a p of 1 - 1e-3 rounds to 1, and the gradient would be 0."""
    logits = torch.zeros(3, VOCABULARY, dtype=torch.bfloat16)
    targets = torch.tensor([5, 0, 319])
    logits[range(3), targets] = torch.tensor([13.0, 14.0, 15.0], dtype=torch.bfloat16)
    exact = logits.double().requires_grad_()
    [want] = torch.autograd.grad(F.cross_entropy(exact, targets, reduction="sum"), exact)
    assert (torch.softmax(logits, -1)[range(3), targets] == 1).all()
    _, got = cross_entropy(logits.clone(), targets, VOCABULARY)
    assert got.dtype == torch.bfloat16
    assert (got[range(3), targets] < 0).all()
    torch.testing.assert_close(got.double(), want, rtol=2**-6, atol=0)
