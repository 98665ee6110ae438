"""Base and tuned model side by side in tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model.evaluation.comparison import Difference
from model.evaluation.tables import (
    common_failures,
    formatted,
    pass_table,
    sample_table,
    score_table,
    score_table_markdown,
    signed,
)

METRICS = {
    "untuned/eval_loss": 3.0, "best/eval_loss": 1.5, "untuned/test_loss": 3.0, "test/loss": 0.75,
    "untuned/stop_rate": 0.25, "sample/stop_rate": 1.0, "untuned/reference_stop_rate": 0.5,
}  # fmt: skip
DIFFERENCES = [
    Difference("loss", 3.0, 0.75, -2.25, -2.5, -2.0, 1e-9, 10, "better", 1e-8),
    Difference("stopped", 0.25, 1.0, 0.75, None, None, 0.2, 1, "no difference", 0.4),
]


def _record(row: int, **values: Any) -> dict[str, Any]:
    text = {"prompt": "p", "reference": "c", "base_text": "b", "text": "t", "base_stopped": False, "stopped": True}
    passed = {"family": None, "base_passed": None, "passed": None, "failure": None}
    return {"row": row, **text, **passed, **values}


def test_scores_and_their_differences_stand_in_one_line() -> None:
    """In the order and form of the scoreboard; what has no interval shows none."""
    validation, loss, stopped = score_table(METRICS, DIFFERENCES)
    assert validation[:6] == ("validation loss", "3.0000", "1.5000", "", "", "")
    assert loss[:6] == ("test loss", "3.0000", "0.7500", "-2.2500", "-2.5000 to -2.0000", "better")
    assert stopped[:6] == ("stop rate", "25.0%", "100.0%", "+75.0%", "", "no difference")
    assert (loss.better, stopped.better, loss.reference, stopped.reference) == ("lower", "higher", "", "50.0%")


def test_markdown_names_the_direction_and_the_ceiling() -> None:
    lines = score_table_markdown(METRICS, DIFFERENCES)
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[3] == (
        "| test loss | 3.0000 | 0.7500 | -2.2500 | -2.5000 to -2.0000 | better | nats per token | lower |"
    )
    assert lines[4].startswith("| stop rate (references: 50.0%) | 25.0% |")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.5, ".1%", "+50.0%"), (-0.5, ".2f", "-0.50"), (0.0, ".1%", "0.0%"), (-1e-9, ".4f", "0.0000")],
)
def test_a_difference_has_its_sign(value: float, form: str, text: str) -> None:
    """What rounds to nothing has none: "-0.0%" would read as a loss."""
    assert signed(value, form) == text


def test_huge_numbers_have_an_exponent() -> None:
    """A perplexity is limited to e^700, which has 305 digits."""
    assert formatted(math.exp(700), ".2f") == "1.014e+304"
    assert formatted(123456.789, ".2f") == "123456.79"
    assert signed(-math.exp(700), ".2f") == "-1.014e+304"


def test_samples_are_the_first_completed_rows() -> None:
    """Reference, base and tuned, not exchanged; at most sixteen."""
    records = [_record(4), _record(5, text=None, stopped=None), *(_record(row) for row in range(6, 40))]
    table = sample_table(records)
    assert table[0] == {
        "row": 4, "prompt": "p", "reference": "c",
        "base": "b", "base_stopped": False, "tuned": "t", "tuned_stopped": True,
    }  # fmt: skip
    assert [record["row"] for record in table] == [4, *range(6, 21)]


def test_passes_are_counted_by_family() -> None:
    """Rows whose tests were not run do not count; rows without a family stand together."""
    records = [
        _record(1, family="a", base_passed=False, passed=True),
        _record(2, family="a", base_passed=True, passed=False, failure="SyntaxError: x"),
        _record(3, base_passed=False, passed=False, failure="SyntaxError: x"),
        _record(4, family="a"),
        _record(5, family="a", passed=True),  # the base is broken and has no completion
    ]
    assert pass_table(records) == [
        {"family": "", "rows": 1, "base": 0.0, "tuned": 0.0},
        {"family": "a", "rows": 2, "base": 0.5, "tuned": 0.5},
    ]
    assert common_failures(records) == {"SyntaxError: x": 2}


def test_a_number_of_many_digits_has_an_exponent() -> None:
    assert (formatted(1e13, ".2f"), formatted(1e11, ".2f")) == ("1e+13", "100000000000.00")
    assert signed(-1e13, ".2f") == "-1e+13"
