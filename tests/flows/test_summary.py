"""What ``make run`` prints at the end."""

from __future__ import annotations

from flows.summary import before_and_after, time_table
from model.evaluation.comparison import Difference
from model.evaluation.scores import ALL_SCORES

METRICS = {
    "untuned/test_loss": 2.5, "test/loss": 1.25,
    "untuned/stop_rate": 0.375, "sample/stop_rate": 1.0, "untuned/reference_stop_rate": 0.5,
    "best/step": 4,
}  # fmt: skip
DIFFERENCES = [
    Difference("loss", 2.5, 1.25, -1.25, -1.5, -1.0, 1e-9, 10, "better", 1e-8),
    Difference("stopped", 0.375, 1.0, 0.625, -0.125, 0.9, 0.2, 10, "no difference", 0.4),
]


def test_base_and_tuned_stand_side_by_side() -> None:
    """Scores that were computed, with their differences, and both completions of each sample."""
    sample = {"prompt": "Add.", "base": "no\nidea", "tuned": "return 1"}
    lines = before_and_after(METRICS, DIFFERENCES, [sample]).splitlines()
    assert lines[1:5] == [
        "held-out rows        base   tuned difference  95 % interval",
        "test loss          2.5000  1.2500    -1.2500  -1.5000 to -1.0000   better",
        "stop rate           37.5%  100.0%     +62.5%  -12.5% to +90.0%     no difference",
        "the references themselves: stop rate 50.0%",
    ]
    assert lines[6:] == ["Add.", "  base:", "    no", "    idea", "  tuned:", "    return 1"]


def test_the_table_fits_a_terminal() -> None:
    """At most 80 columns, with the widest values that scores have in practice."""
    metrics = {name: 123.4 if "perplexity" in name or "length" in name else 1.0
               for score in ALL_SCORES for name in (score.base, score.tuned)}  # fmt: skip
    differences = [
        Difference(score.name, 1.0, 1.0, -0.5, -0.75, -0.25, 0.2, 10, "no difference", 0.4) for score in ALL_SCORES
    ]
    lines = before_and_after(metrics, differences, []).splitlines()
    assert len(lines) == 2 + len(ALL_SCORES)
    assert max(map(len, lines)) <= 80


def test_the_times_add_up() -> None:
    """Seconds and share of each step, and the total."""
    assert time_table({"start": 1.0, "train": 3.0}).splitlines() == [
        "time               seconds     share",
        "start                 1.00     25.0%",
        "train                 3.00     75.0%",
        "total                 4.00    100.0%",
    ]
