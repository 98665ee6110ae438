"""The median rule on curves written by hand."""

from __future__ import annotations

import pytest

from model.engine.median import Curve, best_until, is_unpromising, median_of_others

GOOD: Curve = [(0.0, 3.0), (0.5, 1.0), (1.0, 0.5)]
FAIR: Curve = [(0.0, 3.0), (0.5, 2.0), (1.0, 1.5)]
POOR: Curve = [(0.0, 3.0), (0.5, 2.5), (1.0, 2.6)]
OTHERS = [GOOD, FAIR, POOR]


@pytest.mark.parametrize(
    ("curve", "ends"),
    [
        ([(0.0, 3.0)], False),  # the base: all are equal
        ([(0.0, 3.0), (0.5, 2.0)], False),  # as good as the median
        ([(0.0, 3.0), (0.5, 2.01)], True),
        ([(0.0, 3.0), (0.25, 2.9)], False),  # at this share the others are at 3.0
        ([(0.0, 3.0), (0.5, 1.9), (0.75, 2.4)], False),  # its best counts, and not its latest
        ([(0.0, 3.0), (0.75, 2.1)], True),  # the others' latest validation before this share
        ([], False),
    ],
)
def test_the_best_loss_is_compared_at_the_same_share_of_steps(curve: Curve, ends: bool) -> None:
    """With the median over the others' best losses up to there."""
    assert is_unpromising(curve, OTHERS) is ends


def test_few_others_end_nothing() -> None:
    """With two others there is no telling."""
    assert not is_unpromising([(0.0, 3.0), (0.5, 9.0)], [GOOD, FAIR])
    assert median_of_others([(0.5, 9.0)], [GOOD, FAIR]) is None


def test_a_trial_that_was_ended_early_counts_as_far_as_it_came() -> None:
    """Up to its last validation it is one of the others, and not beyond it."""
    ended = POOR[:2]
    assert median_of_others([(0.5, 9.0)], [GOOD, FAIR, ended]) == 2.0
    assert median_of_others([(0.75, 9.0)], [GOOD, FAIR, ended]) is None
    assert best_until(ended, 0.5) == 2.5
    assert best_until(ended, 0.51) is None
