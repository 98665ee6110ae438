"""The median rule: which trial of a sweep need not be trained to its end (Golovin et al. 2017, "Google Vizier").

Trials are compared at the same share of their steps, and not at the same step: the schedule of the learning rate is
stretched over all steps of a trial, whatever their number. Where all trials have as many steps it is the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

FEWEST_OTHERS = 3  # trials to compare with

Curve = Sequence[tuple[float, float]]
"""Validations of a trial in their order: the share of its steps done, and the loss in nats per response token."""


def best_until(curve: Curve, share: float) -> float | None:
    """The lowest loss of a trial up to a share of its steps; None if it was not trained so far."""
    if not curve or curve[-1][0] < share:
        return None
    return min(loss for done, loss in curve if done <= share)


def median_of_others(curve: Curve, others: Sequence[Curve]) -> float | None:
    """The median of the other trials' lowest losses at the share of steps that a trial has come to.

    Unlike Vizier's, which is over running averages, and counts complete trials only. Here a trial that was ended
    early counts as far as it came: without it the median would be that of the good ones, and fall with every trial.

    Returns:
        None if fewer than ``FEWEST_OTHERS`` others have come so far.
    """
    if not curve:
        return None
    found = [best_until(other, curve[-1][0]) for other in others]
    losses = [loss for loss in found if loss is not None]
    return statistics.median(losses) if len(losses) >= FEWEST_OTHERS else None


def is_unpromising(curve: Curve, others: Sequence[Curve]) -> bool:
    """Whether the lowest loss of a trial is worse than the median of the others at the same share of their steps."""
    median = median_of_others(curve, others)
    return median is not None and min(loss for _, loss in curve) > median
