"""The loss: next-token cross-entropy where it is borne, never holding all logits at once; and scores of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.packing import pack, split_evenly
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.loss import cross_entropy
from model.engine.trunk import TrunkOutputs

_CHUNK = {"cuda": 4096, "cpu": 512}  # positions whose logits exist at a time
_LANES = 64  # matrix products of odd width are slow: the vocabulary is padded to a multiple of this


def padded_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's weight (V, D) in ``dtype``, with rows of zeros up to a multiple of 64."""
    return F.pad(weight.detach().to(dtype), (0, 0, 0, -weight.size(0) % _LANES))


def _parts(count: int, device: torch.device) -> Iterator[slice]:
    """As few parts as ``_CHUNK`` allows, of one size: a short rest would want another kernel, to be loaded first."""
    few = max(1, -(-count // _CHUNK[device.type]))
    size = max(1, -(-count // few))
    for start in range(0, count, size):
        yield slice(start, start + size)


@torch.no_grad()
def head_loss(
    hidden: Tensor,
    head: Tensor,
    vocabulary: int,
    targets: Tensor,
    weights: Tensor | None = None,
    head_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses, and its gradient with respect to the hidden states.

    As in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024), the gradient is computed on the way: of
    all logits only one chunk exists at a time.

    Args:
        hidden: (M, D) in the dtype to compute in.
        head: ``padded_head`` of the weight.
        targets: (M,).
        weights: (M,), or None where all are 1.
        head_gradient: (V, D); the gradient with respect to the head's weight is added to it.

    Returns:
        The sum, a float64 scalar, and (M, D).
    """
    gradient = torch.empty_like(hidden)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    if weights is not None:
        weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    for part in _parts(len(targets), hidden.device):
        h = hidden[part]
        losses, logit_gradient = cross_entropy(h @ head.t(), targets[part], vocabulary)
        if weights is not None:
            losses = losses * weights[part]
            logit_gradient *= weights[part, None]
        total += losses.sum(dtype=torch.float64)
        torch.mm(logit_gradient, head, out=gradient[part])
        if head_gradient is not None:
            head_gradient += (logit_gradient.t() @ h)[:vocabulary]
    return total, gradient


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, vocabulary: int, targets: Tensor) -> Tensor:
    """Losses in nats (M,) of targets (M,) given hidden states (M, D), in fp32 at least."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=dtype, device=hidden.device)
    for part in _parts(len(targets), hidden.device):
        losses[part], _ = cross_entropy(hidden[part] @ head.t(), targets[part], vocabulary)
    return losses


def row_losses(
    engine: Engine, dataset: CodeAlpacaDataset, max_tokens: int, trunk: TrunkOutputs | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Score every row on its response.

    Args:
        dataset: with prompt_loss_weight 0.
        max_tokens: about so many tokens per forward pass.
        trunk: where the trunk's outputs for this data set are kept between scorings.

    Returns:
        Per row the summed loss in nats (float64) and the number of response tokens.
    """
    model = engine.model
    head = padded_head(model.lm_head.weight, engine.dtype)
    sums = np.zeros(len(dataset))
    counts = np.zeros(len(dataset), dtype=np.int64)
    training = model.training
    model.eval()
    for rows in split_evenly(np.arange(len(dataset)), dataset.lengths[:, 0], max_tokens):
        batch = pack(dataset, rows, engine.device)
        if not len(batch.targets):
            continue
        x = trunk(batch) if trunk is not None else engine.trunk(batch)
        with torch.no_grad():
            hidden = engine.top(x, batch)
        losses = token_losses(hidden, head, model.config.vocab_size, batch.targets).double().cpu().numpy()
        sums[batch.rows] = np.bincount(batch.owner, losses, minlength=len(batch.rows))
        counts[batch.rows] = np.bincount(batch.owner, minlength=len(batch.rows))
    model.train(training)
    return sums, counts


def mean_loss(sums: np.ndarray, counts: np.ndarray) -> float:
    """Nats per response token over all rows: the tokens are averaged, not the rows or the batches."""
    return float(sums.sum() / counts.sum())


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; of one beyond what a float can hold, the largest such number."""
    return math.exp(min(loss, 700.0))
