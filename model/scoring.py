"""The loss: next-token cross-entropy on the positions that bear it, summed, never averaged too early."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.device import autocast
from model.gpt import GPTModel
from model.tokens import IGNORE, CodeAlpacaDataset, collate_fn, micro_batches


def next_token_losses(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each labelled token given the tokens before it.

    Position t predicts token t + 1. Logits are computed for positions that bear loss only, the loss in fp32
    at least.

    Args:
        hidden: (B, T, D).
        head: maps D to V.
        labels: (B, T), the input ids, IGNORE where no loss is.

    Returns:
        losses (N,) in nats for the N labelled positions, and the mask (B, T - 1) they come from.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE
    logits = head(hidden[:, :-1][mask])  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets[mask], reduction="none"), mask


def weighted_loss_sum(model: GPTModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum over a batch of loss x weight, a scalar; the caller divides by the weight of the whole step."""
    losses, mask = next_token_losses(model.hidden(batch["input_ids"]), model.lm_head, batch["labels"])
    return (losses * batch["loss_weights"][:, 1:][mask]).sum()


@torch.no_grad()
def row_losses(
    model: GPTModel, dataset: CodeAlpacaDataset, dtype: torch.dtype, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score every row on its response.

    Args:
        dataset: with prompt_loss_weight 0.
        dtype: as in training.
        max_tokens: padded tokens per forward pass.

    Returns:
        Per row the summed loss in nats (float64) and the number of response tokens.
    """
    device = model.wte.weight.device
    lengths = dataset.lengths[:, 0].tolist()
    sums = np.zeros(len(dataset))
    counts = np.zeros(len(dataset), dtype=np.int64)
    training = model.training
    model.eval()
    for group in micro_batches(lengths, max_tokens):
        batch = {key: value.to(device) for key, value in collate_fn([dataset[i] for i in group]).items()}
        with autocast(device, dtype):
            losses, mask = next_token_losses(model.hidden(batch["input_ids"]), model.lm_head, batch["labels"])
        per_row = torch.zeros(mask.shape, dtype=torch.float64, device=device)
        per_row[mask] = losses.double()
        sums[group] = per_row.sum(dim=1).cpu().numpy()
        counts[group] = mask.sum(dim=1).cpu().numpy()
    model.train(training)
    return sums, counts


def mean_loss(sums: np.ndarray, counts: np.ndarray) -> float:
    """Nats per response token over all rows: the tokens are averaged, not the rows or the batches."""
    return float(sums.sum() / counts.sum())


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; of one beyond what a float can hold, the largest such number."""
    return math.exp(min(loss, 700.0))
