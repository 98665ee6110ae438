"""The median rule as a trial's process applies it."""

from __future__ import annotations

from tasks.trial_worker import MedianRule


def test_validations_that_are_repeated_replace_those_of_before() -> None:
    """The journal of a killed process is ahead of its checkpoints: what is to come does not help a trial."""
    others = [[(0.0, 3.0), (0.2, 2.0)]] * 3
    rule = MedianRule([(0.0, 3.0), (0.2, 2.5), (0.4, 1.5)], lambda: others)
    assert not rule.ends  # no other has come so far
    rule.add(0.2, 2.5)
    assert rule.ends
    assert rule.reason.startswith("after 20% of its steps the best validation loss, 2.5000, was worse than")
