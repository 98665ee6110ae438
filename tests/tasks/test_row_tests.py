"""Tests of rows are run once for what both models wrote, and not for what is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ops.sandbox.guards import RowResult, Snippet, run_tests
from tasks import row_tests
from tasks.row_tests import RowTests, content_of

GOOD, BAD = ("x = 1", ["assert x == 1"]), ("x = 2", ["assert x == 1"])
ENDLESS = ("while True:\n    pass", ["assert True"])
DEADLY = ("x = [0] * 10**9", ["assert True"])


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Snippet]:
    """The snippets that were run in the sandbox."""
    seen: list[Snippet] = []

    def run(snippets: Sequence[Snippet], seconds: float) -> list[RowResult]:
        seen.extend(snippets)
        return run_tests(snippets, seconds)

    monkeypatch.setattr(row_tests, "run_tests", run)
    return seen


def test_equal_rows_are_run_once(executed: list[Snippet]) -> None:
    """Each model has its results, in their order, as if all had been run."""
    base, tuned = [BAD, GOOD, BAD], [GOOD, GOOD, ("x = 1", ["assert x == 2"])]
    found = RowTests({}).run(base, tuned)
    assert found == (run_tests(base), run_tests(tuned))
    assert executed == [BAD, GOOD, ("x = 1", ["assert x == 2"])]


def test_what_is_known_is_not_run(executed: list[Snippet]) -> None:
    """A later run has the base's results from the first; its own are for no other."""
    first = RowTests({})
    want = first.run([BAD, GOOD], [("y = 1", ["assert y"])])
    executed.clear()
    later = RowTests(first.of_base)
    assert later.run([BAD, GOOD], [("y = 1", ["assert y"])]) == want
    assert executed == [("y = 1", ["assert y"])]
    assert later.of_base == first.of_base
    assert set(first.of_base) == {content_of(BAD, 2.0), content_of(GOOD, 2.0)}


def test_a_limit_is_part_of_a_result(executed: list[Snippet]) -> None:
    first = RowTests({})
    first.run([GOOD], [], 1.0)
    first.run([GOOD], [], 2.0)
    assert executed == [GOOD, GOOD]


def test_what_the_machine_decided_is_not_kept(executed: list[Snippet]) -> None:
    """A row that ran out of time may pass on an idle machine, one without enough memory will not."""
    tests = RowTests({})
    (slow, large), _ = tests.run([ENDLESS, DEADLY], [], 0.2)
    assert (slow.outcome, large) == ("timeout", RowResult("error", "MemoryError: "))
    assert tests.of_base == {content_of(DEADLY, 0.2): large}


@pytest.mark.parametrize("reason", ["ended without a result (signal 9)", "the sandbox ended early (exit status 1)"])
def test_a_process_that_was_killed_is_not_settled(reason: str) -> None:
    """Another process may have taken the memory."""
    assert not RowResult("error", reason).is_settled
    assert not RowResult("not_executed", "bubblewrap is not installed").is_settled
    assert RowResult("error", "NameError: x").is_settled
