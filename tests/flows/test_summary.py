"""What ``make run`` prints at the end."""

from __future__ import annotations

from flows.summary import before_and_after, time_table

METRICS = {"base/test_loss": 2.5, "test/loss": 1.25, "base/stop_rate": 0.375, "sample/stop_rate": 1.0, "best/step": 4}


def test_base_and_tuned_stand_side_by_side() -> None:
    """Scores that were computed, with their units, and both completions of each sample."""
    sample = {"prompt": "Add.", "base": "no\nidea", "tuned": "return 1"}
    lines = before_and_after(METRICS, [sample]).splitlines()
    assert lines[1:4] == [
        "held-out rows           base     tuned",
        "test loss             2.5000    1.2500  nats per token",
        "stop rate              37.5%    100.0%  share of completions",
    ]
    assert lines[5:] == ["Add.", "  base:", "    no", "    idea", "  tuned:", "    return 1"]


def test_the_times_add_up() -> None:
    """Seconds and share of each step, and the total."""
    assert time_table({"start": 1.0, "train": 3.0}).splitlines() == [
        "time               seconds     share",
        "start                 1.00     25.0%",
        "train                 3.00     75.0%",
        "total                 4.00    100.0%",
    ]
