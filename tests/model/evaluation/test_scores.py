"""The scoreboard: each score is computed from the records of rows, and all names and tables come from its entries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from model.evaluation.scores import ALL_SCORES, SCOREBOARD, headline, score_both, score_sources

ROOT = Path(__file__).resolve().parents[3]
BASE = {
    "loss": 10.0, "stopped": False, "syntax": False, "chrf": 20.0, "exact": False, "repetition": 0.5, "empty": True,
    "length": 10, "passed": False,
}  # fmt: skip
TUNED = {
    "loss": 2.0, "stopped": True, "syntax": True, "chrf": 80.0, "exact": True, "repetition": 0.1, "empty": False,
    "length": 30, "passed": True,
}  # fmt: skip


def _record(tokens: int, size: int, base: dict[str, Any] = BASE, tuned: dict[str, Any] = TUNED) -> dict[str, Any]:
    sides = {f"base_{name}": value for name, value in base.items()} | tuned
    return {"tokens": tokens, "bytes": size, "reference_stopped": True, "reference_syntax": False, **sides}


def test_scores_of_both_models() -> None:
    """Sums over sums: a long row weighs more in the loss, and each row the same in the rest."""
    second = {**TUNED, "loss": 8.0, "stopped": False, "chrf": 40.0, "length": 31, "repetition": 0.0}
    metrics = score_both([_record(4, 8), _record(16, 12, BASE, second)])
    assert metrics == pytest.approx(
        {
            "untuned/test_loss": 1.0, "test/loss": 0.5,
            "untuned/test_perplexity": math.e, "test/perplexity": math.exp(0.5),
            "untuned/bits_per_byte": 1 / math.log(2), "test/bits_per_byte": 0.5 / math.log(2),
            "untuned/stop_rate": 0.0, "sample/stop_rate": 0.5, "untuned/reference_stop_rate": 1.0,
            "untuned/syntax_rate": 0.0, "sample/syntax_rate": 1.0, "untuned/reference_syntax_rate": 0.0,
            "untuned/chrf": 20.0, "sample/chrf": 60.0,
            "untuned/exact_match": 0.0, "sample/exact_match": 1.0,
            "untuned/repetition": 0.5, "sample/repetition": 0.05,
            "untuned/empty_rate": 1.0, "sample/empty_rate": 0.0,
            "untuned/length": 10.0, "sample/length": 30.5,
            "untuned/pass_rate": 0.0, "sample/pass_rate": 1.0,
        }
    )  # fmt: skip


def test_rows_without_a_value_are_left_out() -> None:
    """A row without tests is in the loss and not in the pass rate; where no row has a value there is no score."""
    bare = {**dict.fromkeys(BASE), "loss": 3.0}
    metrics = score_both([_record(1, 1), _record(1, 1, bare, bare)])
    assert metrics["sample/pass_rate"] == 1.0
    assert metrics["test/loss"] == 2.5
    alone = score_both([{**_record(1, 1, bare, bare), "reference_stopped": None, "reference_syntax": None}])
    assert {name.split("/")[1] for name in alone} == {
        "loss", "test_loss", "perplexity", "test_perplexity", "bits_per_byte",
    }  # fmt: skip
    # pandas has NaN where a table has no value.
    assert score_both([_record(1, 1), _record(1, 1, bare, {**bare, "passed": math.nan})])["sample/pass_rate"] == 1.0


def test_a_huge_loss_has_a_perplexity() -> None:
    """exp does not overflow, neither for the value nor for its change."""
    broken = {**TUNED, "loss": 1e6}
    assert math.isfinite(score_both([_record(1, 1, BASE, broken)])["test/perplexity"])


def test_the_headline_decides_between_versions() -> None:
    metrics = {**score_both([_record(4, 8)]), "best/eval_loss": 0.25}
    assert headline(metrics) == {"best/eval_loss": 0.25, "test/loss": 0.5, "test/perplexity": math.exp(0.5)}


def test_only_what_was_computed_has_a_source() -> None:
    assert [line.split(":")[0] for line in score_sources({"test/loss": 1.0})] == ["- test loss"]


@pytest.mark.parametrize("score", ALL_SCORES, ids=lambda score: score.title)
def test_an_entry_is_complete(score: object) -> None:
    """A new score has names of its own, a source, a title that fits its table, and a mention on both pages."""
    entry = next(each for each in ALL_SCORES if each is score)
    names = [name for each in ALL_SCORES for name in (each.base, each.tuned)]
    assert names.count(entry.base) == names.count(entry.tuned) == 1
    assert [each.name for each in ALL_SCORES].count(entry.name) == 1
    assert entry.base.startswith("untuned/")
    assert len(entry.title) <= 16
    assert entry.source
    assert f"{0.5:{entry.form}}"
    for page in ("docs/outputs.md", "docs/evaluation.md"):
        assert f"`{entry.tuned}`" in (ROOT / page).read_text(), f"{page} lacks {entry.tuned}"


@pytest.mark.parametrize("score", SCOREBOARD, ids=lambda score: score.title)
def test_a_change_is_the_difference_of_two_values(score: object) -> None:
    """``change`` agrees with ``finish``, and equal ratios are exactly no change."""
    entry = next(each for each in SCOREBOARD if each is score)
    assert float(entry.change(1.5, -0.25)) == pytest.approx(entry.finish(1.25) - entry.finish(1.5))  # type: ignore[arg-type]
    assert float(entry.change(1.5, 0.0)) == 0.0  # type: ignore[arg-type]
