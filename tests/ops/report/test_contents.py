"""What a page shows of records: lines, rows, reasons."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from finished_runs import make_records

from model.evaluation.comparison import compare
from ops.report.contents import (
    EXTREMES,
    ScoreLine,
    extreme_rows,
    failures,
    gain_of,
    gains,
    lengths,
    score_lines,
    summary,
)

RECORDS = make_records(60)


def test_lines_are_the_differences_in_words() -> None:
    lines = {line.title: line for line in score_lines(compare(RECORDS, 0), {"untuned/reference_stop_rate": 0.5})}
    loss = lines["test loss"]
    assert (loss.unit, loss.direction, loss.rows, loss.verdict) == (
        "nats per token",
        "lower is better",
        "60",
        "better",
    )
    assert float(loss.new) - float(loss.old) == pytest.approx(float(loss.difference), abs=2e-4)
    low, high = (float(end) for end in loss.interval.split(" to "))
    assert low < float(loss.difference) < high < 0
    assert loss.p == "p < 0.001"
    assert lines["stop rate"].ceiling == "50.0%"
    assert lines["chrF"].ceiling == ""
    assert "syntax rate" not in lines, "no row has a value"


def _line(title: str, verdict: str) -> ScoreLine:
    return ScoreLine(title, "", "", "1.00", "2.00", "", "+1.00", "+0.50 to +1.50", "", "60", verdict)


LOSS = "loss 1.00 → 2.00 (+1.00, 95 % interval +0.50 to +1.50)"


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (("better", "better"), f"B is better than A: {LOSS}; better too: chrF."),
        (("worse", "better"), f"B is worse than A: {LOSS}; better: chrF."),
        (("no difference", "worse"), f"No difference between B and A is shown: {LOSS}; worse: chrF."),
        (("better", "no difference"), f"B is better than A: {LOSS}."),
    ],
)
def test_the_summary_names_what_is_beyond_chance(verdicts: tuple[str, str], sentence: str) -> None:
    assert summary([_line("loss", verdicts[0]), _line("chrF", verdicts[1])], "A", "B") == sentence
    assert summary([], "A", "B") == "B and A have no score in common."


def test_a_sentence_begins_with_a_capital() -> None:
    line = _line("loss", "no difference")
    assert summary([line], "the base", "the tuned model").startswith("No difference between the tuned model and the ")
    assert summary([], "the base", "the tuned model") == "The tuned model and the base have no score in common."


def test_a_broken_model_is_the_result() -> None:
    """Whatever its other scores are; a base can be broken as well."""
    records = [
        {"base_loss": 1.0, "loss": math.inf},
        {"base_loss": 1.0, "loss": 2.0},
        {"base_loss": 1.0, "loss": None},
    ]
    lines = [_line("stop rate", "better"), _line("chrF", "worse"), _line("length", "no difference")]
    said = "B is broken, its loss is infinite on 1 of 3 rows: losses are not compared"
    assert summary(lines, "A", "B", records) == f"{said}; better: stop rate; worse: chrF."
    assert summary([], "A", "B", records) == f"{said}."
    both = [{"base_loss": math.inf, "loss": math.inf}]
    assert summary([], "the base", "the tuned model", both) == (
        "The base is broken, its loss is infinite on 1 of 1 rows and the tuned model is broken, its loss is infinite "
        "on 1 of 1 rows: losses are not compared."
    )


def test_a_row_has_its_units_and_digits() -> None:
    """Also where a table has made floats of its lengths."""
    (record,) = make_records(1)
    record |= {"base_length": 65.0, "length": 1234, "base_chrf": 1.0, "chrf": 50.456, "base_repetition": 0.25,
               "base_stopped": False, "stopped": 1.0, "base_loss": 20.0, "loss": 3.5}  # fmt: skip
    _, (card, *_) = extreme_rows([record, *make_records(3, gain=2.0, first=1)])
    assert card.facts == [
        ("summed loss", "20.00 nats", "3.50 nats"),
        ("stopped", "no", "yes"),
        ("chrF", "1.00", "50.46"),
        ("repetition", "25.0%", "0.0%"),
        ("length", "65 characters", "1,234 characters"),
    ]


def test_a_score_without_interval_has_none_in_the_sentence() -> None:
    assert summary([replace(_line("loss", "no difference"), interval="")], "A", "B").endswith("loss 1.00 → 2.00.")


def test_extreme_rows_are_those_of_the_largest_and_smallest_gain() -> None:
    order = sorted(RECORDS, key=gain_of)
    best, worst = extreme_rows(RECORDS)
    assert [card.row for card in best] == [str(r["row"]) for r in reversed(order[-EXTREMES:])]
    assert [card.row for card in worst] == [str(r["row"]) for r in order[:EXTREMES]]
    assert best[0].gain == f"{gain_of(order[-1]):+.2f}"


@pytest.mark.parametrize(("rows", "each"), [(0, 0), (1, 0), (3, 1), (9, 4), (10, 5)])
def test_no_row_is_among_the_best_and_the_worst(rows: int, each: int) -> None:
    best, worst = extreme_rows(RECORDS[:rows])
    assert (len(best), len(worst)) == (each, each)
    assert not {card.key for card in best} & {card.key for card in worst}


def test_rows_without_losses_or_completions_are_shown_as_far_as_they_go() -> None:
    """As after a join of runs with other tokenizers, or with sample_rows below the rows of the split."""
    without = [{**record, "loss": None} for record in RECORDS]
    assert extreme_rows(without) == ([], [])
    assert gains(without, "A", "B") is None
    (card, *_), _ = extreme_rows([{**record, "text": None, "chrf": None} for record in RECORDS])
    assert "not completed" in card.new
    assert "not completed" not in card.old
    assert not [title for title, _, _ in card.facts if title == "chrF"]


def test_gains_are_counted_by_their_sign() -> None:
    records = [{"base_loss": 10.0, "loss": loss, "tokens": 5} for loss in (5.0, 5.0, 12.0, 10.0)]
    found = gains(records, "A", "B")
    assert found
    assert "Of 4 rows, 2 have a lower loss under B than under A, and 1 a higher one." in found.sentence


def test_lengths_are_those_of_the_records() -> None:
    found = lengths([{"tokens": count} for count in (1, 2, 3, 4, 100)])
    assert found
    assert "has 3 tokens at the median" in found.sentence
    assert "100 at most" in found.sentence
    assert lengths([]) is None


def test_reasons_that_differ_by_their_line_are_one() -> None:
    base = [f"SyntaxError: oops (<unknown>, line {line})" for line in (1, 2, 3)]
    records = [{"base_passed": False, "base_failure": reason, "passed": True, "failure": None} for reason in base] + [
        {"base_passed": None, "base_failure": None, "passed": False, "failure": "assert f(1) == 2"}
    ]
    assert failures(records) == [("SyntaxError: oops", "3", "0"), ("an assertion failed", "0", "1")]


def test_a_row_without_a_loss_has_no_gain() -> None:
    assert math.isnan(gain_of({"base_loss": 1.0}))
    assert gain_of({"base_loss": 3.0, "loss": 1.0}) == 2.0
