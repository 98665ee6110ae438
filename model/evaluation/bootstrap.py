"""The paired bootstrap over the rows that two models were scored on: intervals, and the gate of a promotion."""

from __future__ import annotations

from collections.abc import Iterator
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
    means = np.empty(resamples)
    for start, rows in _draws(len(gains), seed, resamples):
        means[start : start + len(rows)] = gains[rows].sum(axis=1) / counts[rows].sum(axis=1)
    lower, upper = np.quantile(means, [0.05, 0.95])
    return Improvement(float(gains.sum() / counts.sum()), float(lower), float(upper), len(gains))


def resampled_sums(columns: Array, seed: int, resamples: int) -> Array:
    """Sums over units that are drawn with replacement; all columns of a unit are drawn together.

    Args:
        columns: (U, C) of U rows, or of U families of rows.
        seed: of the draws.
        resamples: how often U units are drawn.

    Returns:
        (resamples, C) in float64.
    """
    units = len(columns)
    sums = np.empty((resamples, columns.shape[1]))
    for start, drawn in _draws(units, seed, resamples):
        offsets = np.arange(len(drawn))[:, None] * units
        times = np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * units)  # how often each was drawn
        sums[start : start + len(drawn)] = times.reshape(len(drawn), units).astype(np.float64) @ columns
    return sums


def _draws(units: int, seed: int, resamples: int) -> Iterator[tuple[int, Array]]:
    """Portions of the resamples: number of the first, and (portion, units) numbers of units."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN // units)
    for start in range(0, resamples, at_once):
        yield start, generator.integers(0, units, (min(at_once, resamples - start), units))


@dataclass(frozen=True)
class Spread:
    """How far a difference varies over resamples.

    Intervals and p values are those of Student's t with the bootstrap's standard error (Efron & Tibshirani 1993,
    section 12.3; Hesterberg 2015, section 4.3) and one degree of freedom less than there are units. Percentiles of
    few units are too narrow: with 5 families they hold the truth in 83 % of cases where these do in 95 %
    (docs/evaluation.md).

    Attributes:
        error: standard error.
        units: number of units that were drawn.
        families: the same number if the units were families, 0 if they were rows.
    """

    error: float
    units: int
    families: int = 0

    @classmethod
    def of(cls, changes: Array, units: int, families: int = 0) -> Spread:
        """Of resampled differences (B,). The bootstrap's variance is too small by (units - 1) / units."""
        if units < 2:
            return cls(0.0, units, families)
        largest = float(np.abs(changes).max())
        if largest == 0:
            return cls(0.0, units, families)
        error = float((changes / largest).std() * largest * np.sqrt(units / (units - 1)))  # no square overflows
        rounding = 1e-12 * largest
        return cls(error if error > rounding else 0.0, units, families)

    def interval(self, difference: float) -> tuple[float, float] | None:
        """The two-sided 95 % interval around a difference; None for a single unit."""
        if self.units < 2:
            return None
        from scipy import special  # here: each run imports this file at its start

        width = float(special.stdtrit(self.units - 1, 0.975)) * self.error
        return difference - width, difference + width

    def p(self, difference: float) -> float | None:
        """The two-sided p of "no difference"; None for a single unit.

        Where all units differ by the same it is that of the sign test.
        """
        if self.units < 2:
            return None
        if difference == 0:
            return 1.0
        if self.error == 0:
            return float(0.5 ** (self.units - 1))
        from scipy import special

        return float(2 * special.stdtr(self.units - 1, -abs(difference) / self.error))


def mcnemar_p(old: Array, new: Array) -> float:
    """McNemar's exact two-sided p: the rows on which two models differ are fair tosses if neither is better.

    McNemar 1947, Psychometrika 12; exact by the binomial distribution. It takes rows as independent.

    Args:
        old: (R,) 0 or 1.
        new: (R,) likewise.
    """
    from scipy import special

    gained, lost = int(np.count_nonzero(new > old)), int(np.count_nonzero(new < old))
    return float(min(1.0, 2 * special.bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0


def holm(ps: list[float]) -> list[float]:
    """p values corrected for their number, in their order (Holm 1979, Scandinavian Journal of Statistics 6)."""
    corrected = [1.0] * len(ps)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected
