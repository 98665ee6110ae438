"""Is one model better than another? A paired bootstrap over the rows that both were scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_DRAWN = 4_000_000  # row numbers drawn at a time, about 64 MB with what is looked up for them

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Improvement:
    """By how much a loss per token fell, in nats; positive is better.

    Attributes:
        mean: over all rows, weighted by their tokens: the difference of the two reported losses.
        lower: lower end of the one-sided 95 % interval.
        upper: upper end of the other one-sided 95 % interval; both ends together hold 90 %.
        rows: compared.
    """

    mean: float
    lower: float
    upper: float
    rows: int


def paired_improvement(old: Array, new: Array, tokens: Array, seed: int, resamples: int = 10_000) -> Improvement:
    """Compare summed losses of the same rows under two models.

    The percentile bootstrap (Efron & Tibshirani 1993, chapter 13). Rows are drawn with replacement, both losses
    of a row together: what makes a row hard or easy for either model cancels out, and only the difference
    between them spreads. Tokens of a row are not independent, so that rows are drawn, not tokens.

    Args:
        old: (R,) nats, summed over each row's response.
        new: (R,) likewise.
        tokens: (R,) response tokens of each row.
        seed: of the draws.
        resamples: how often R rows are drawn.

    Raises:
        ValueError: shapes differ, there is no row or token, or a loss is not finite.
    """
    if not old.shape == new.shape == tokens.shape or old.ndim != 1:
        raise ValueError(f"losses of the same rows are needed, not of shape {old.shape}, {new.shape}, {tokens.shape}")
    if not len(old) or tokens.min() <= 0:
        raise ValueError("no rows, or one without a token: nothing can be compared")
    gains = old.astype(np.float64) - new.astype(np.float64)
    if not np.isfinite(gains).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(gains))} of {len(gains)} rows have a loss that is not finite"
        )
    counts = tokens.astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    at_once = max(1, _DRAWN // len(gains))
    for start in range(0, resamples, at_once):
        rows = generator.integers(0, len(gains), (min(at_once, resamples - start), len(gains)))
        means[start : start + len(rows)] = gains[rows].sum(axis=1) / counts[rows].sum(axis=1)
    lower, upper = np.quantile(means, [0.05, 0.95])
    return Improvement(float(gains.sum() / counts.sum()), float(lower), float(upper), len(gains))
