"""The paired bootstrap: it covers what it says, sees what pairing reveals, and is exact where all can be counted."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from model.evaluation.bootstrap import Spread, holm, mcnemar_p, paired_improvement


def _rows(generator: np.random.Generator, rows: int, gain: float) -> tuple[Any, Any, Any]:
    """Losses as they look in this project: rows differ far more than models do, and long rows are easier."""
    tokens = generator.integers(5, 120, rows)
    hardness = generator.gamma(4, 0.3, rows) * (1 + 10 / tokens)
    noise = generator.gamma(2, 0.05, rows) - 0.1
    return hardness * tokens, (hardness - gain - noise) * tokens, tokens


@pytest.mark.parametrize("gain", [0.0, 0.03])
def test_the_interval_covers_the_truth_as_often_as_it_says(gain: float) -> None:
    """In 400 experiments the one-sided bounds hold the true gain in 95 % of them, within four deviations."""
    generator = np.random.default_rng(7)
    below = above = 0
    for experiment in range(400):
        found = paired_improvement(*_rows(generator, 200, gain), seed=experiment, resamples=400)
        below += found.lower <= gain
        above += found.upper >= gain
    for held in (below, above):
        assert held / 400 == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 400) ** 0.5)


def test_pairing_makes_it_sharper() -> None:
    """A gain far smaller than the spread between rows is seen; with the pairs torn apart it is not."""
    generator = np.random.default_rng(1)
    old, new, tokens = _rows(generator, 400, 0.03)
    paired = paired_improvement(old, new, tokens, seed=0)
    assert paired.lower > 0.015
    shuffled = np.random.default_rng(2).permutation(400)
    torn = paired_improvement(old / tokens, (new / tokens)[shuffled], np.ones(400), seed=0)
    assert torn.upper - torn.lower > 5 * (paired.upper - paired.lower)
    assert torn.lower < 0


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_tiny_cases_are_exact(rows: int) -> None:
    """Of up to four rows all resamples can be listed: the bounds are the quantiles of that list."""
    old, new, tokens = np.array([9.0, 4.0, 7.0, 1.0]), np.array([6.0, 5.0, 1.0, 3.0]), np.array([3, 1, 2, 4])
    old, new, tokens = old[:rows], new[:rows], tokens[:rows]
    means = [
        (old - new)[list(chosen)].sum() / tokens[list(chosen)].sum() for chosen in product(range(rows), repeat=rows)
    ]
    found = paired_improvement(old, new, tokens, seed=3, resamples=50_000)
    # Among few values a quantile is one of them, and its neighbours are far away.
    assert found.lower == pytest.approx(np.quantile(means, 0.05, method="inverted_cdf"))
    assert found.upper == pytest.approx(np.quantile(means, 0.95, method="inverted_cdf"))
    assert found.mean == pytest.approx((old - new).sum() / tokens.sum())
    assert found.rows == rows


def test_tokens_weigh_not_rows() -> None:
    """One long row that got worse outweighs many short ones that got better, as in the reported losses."""
    old = np.concatenate([np.full(50, 2.0), [1000.0]])
    new = np.concatenate([np.full(50, 1.0), [1200.0]])
    assert paired_improvement(old, new, np.concatenate([np.full(50, 1), [1000]]), seed=0).mean < 0


def test_equal_models_are_no_improvement() -> None:
    """A tie is exactly nothing: no resample makes something of it."""
    old, _, tokens = _rows(np.random.default_rng(0), 50, 0.0)
    found = paired_improvement(old, old.copy(), tokens, seed=0)
    assert (found.mean, found.lower, found.upper) == (0, 0, 0)


def test_it_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same verdict tomorrow, also where memory is drawn in other portions; another seed, other draws."""
    rows = _rows(np.random.default_rng(0), 60, 0.01)
    first = paired_improvement(*rows, seed=5)
    assert paired_improvement(*rows, seed=5) == first
    assert paired_improvement(*rows, seed=6) != first
    monkeypatch.setattr("model.evaluation.bootstrap._DRAWN", 600)
    assert paired_improvement(*rows, seed=5) == first


@pytest.mark.parametrize(
    ("old", "new", "tokens", "complaint"),
    [
        ([1.0, 2.0], [1.0], [1, 1], "same rows"),
        ([], [], [], "no rows"),
        ([1.0], [1.0], [0], "without a token"),
        ([1.0, 2.0], [1.0, np.nan], [1, 1], "1 of 2 rows have a loss that is not finite"),
        ([np.inf, 2.0], [1.0, 2.0], [1, 1], "1 of 2 rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    old: list[float], new: list[float], tokens: list[int], complaint: str
) -> None:
    """A NaN must not pass for a verdict: every comparison with it is false."""
    with pytest.raises(ValueError, match=complaint):
        paired_improvement(np.array(old), np.array(new), np.array(tokens), seed=0)


@pytest.mark.parametrize(
    ("ps", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01; 2 x 0.03; 1 x 0.04, which is not below the one before
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.6, 0.001, 0.7], [1.0, 0.003, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holms_correction_is_that_of_the_paper(ps: list[float], corrected: list[float]) -> None:
    """Step down: the smallest p by the number of all, the next by one less; Bonferroni's would be larger."""
    assert holm(ps) == pytest.approx(corrected)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 5), (3, 1), (10, 10), (2, 30)])
def test_mcnemars_test_is_the_exact_binomial_one(gained: int, lost: int) -> None:
    """Rows that do not change have no part in it."""
    old = np.array([0] * gained + [1] * lost + [0, 1, 1])
    new = np.array([1] * gained + [0] * lost + [0, 1, 1])
    want = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_p(old, new) == pytest.approx(want)


def test_units_that_all_differ_by_the_same_have_the_sign_tests_p() -> None:
    """No spread is seen in them, and six of six in one direction are 2 / 2**6 by chance."""
    spread = Spread.of(np.full(100, 0.3), units=6)
    assert spread.error == 0
    assert spread.p(0.3) == pytest.approx(2 / 2**6)
    assert spread.interval(0.3) == (0.3, 0.3)
    assert (spread.p(0.0), Spread.of(np.full(100, 0.3), units=1).p(0.3)) == (1.0, None)
