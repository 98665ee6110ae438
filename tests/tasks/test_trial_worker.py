"""The median rule as a trial's process applies it, and how a helper sees that its sweep has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tasks.trial_worker import MedianRule


def test_validations_that_are_repeated_replace_those_of_before() -> None:
    """The journal of a killed process is ahead of its checkpoints: what is to come does not help a trial."""
    others = [[(0.0, 3.0), (0.2, 2.0)]] * 3
    rule = MedianRule([(0.0, 3.0), (0.2, 2.5), (0.4, 1.5)], lambda: others)
    assert not rule.ends  # no other has come so far
    rule.add(0.2, 2.5)
    assert rule.ends
    assert rule.reason.startswith("after 20% of its steps the best validation loss, 2.5000, was worse than")


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_helper_watches_its_stdin_without_holding_it(is_closed: bool) -> None:
    """It sees that stdin is closed; and one that ends while stdin is open ends in order."""
    end = "closed.wait(60)" if is_closed else "time.sleep(0.3)"
    script = f"import time; from tasks.trial_worker import _watch_stdin; closed = _watch_stdin(); {end}"
    helper = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert helper.stdin is not None
    assert helper.stderr is not None
    if is_closed:
        helper.stdin.close()
    assert (helper.wait(60), helper.stderr.read()) == (0, b"")
    assert is_closed or not helper.stdin.closed
