"""Scores of rows: the loss on each row's response, and its mean over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from model.data.packing import pack, split_evenly
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.loss import padded_head, token_losses
from model.engine.ranks import ALONE, Ranks
from model.engine.trunk import TrunkOutputs


def row_losses(
    engine: Engine,
    dataset: CodeAlpacaDataset,
    max_tokens: int,
    trunk: TrunkOutputs | None = None,
    ranks: Ranks = ALONE,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score every row on its response.

    Args:
        engine: runs the model.
        dataset: rows, with prompt_loss_weight 0.
        max_tokens: tokens per forward pass, about.
        trunk: cache of the trunk's outputs for this data set; None computes them each time.
        ranks: processes that score together: each takes some of the packs, and all get all results. The packs, and so
            the results, are those of one process.
        before_each: called before each pack, equally often on all ranks; what it raises ends the scoring.

    Returns:
        For each row the summed loss in nats (float64), and the number of response tokens.
    """
    model = engine.model
    head = padded_head(model.lm_head.weight, engine.dtype)
    sums = np.zeros(len(dataset))
    counts = np.zeros(len(dataset), dtype=np.int64)
    training = model.training
    model.eval()
    packs = [*split_evenly(np.arange(len(dataset)), dataset.lengths[:, 0], max_tokens)]
    for first in range(0, len(packs), ranks.world):
        before_each()
        if first + ranks.rank >= len(packs):
            continue
        batch = pack(dataset, packs[first + ranks.rank], engine.device)
        if not len(batch.targets):
            continue
        x = trunk(batch) if trunk is not None else engine.trunk(batch)
        with torch.no_grad():
            hidden = engine.top(x, batch)
        losses = token_losses(hidden, head, model.config.vocab_size, batch.targets).double().cpu().numpy()
        sums[batch.rows] = np.bincount(batch.owner, losses, minlength=len(batch.rows))
        counts[batch.rows] = np.bincount(batch.owner, minlength=len(batch.rows))
    model.train(training)
    return ranks.merge(sums), ranks.merge(counts)


def mean_loss(sums: np.ndarray, counts: np.ndarray) -> float:
    """Nats per response token: the mean over all tokens, not over rows or batches."""
    return float(sums.sum() / counts.sum())


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; the loss is limited to 700, so that the result is finite."""
    return math.exp(min(loss, 700.0))
