"""The helpers of a sweep, as processes that do no training."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from made_up import ROOT, wait_for

from tasks import trial_helpers
from tasks.trial_helpers import dismiss_helpers, dismissals, start_helpers, waiting_helpers, working_helpers

LOG = logging.getLogger(__name__)
MODULE = "made_up_helper"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module in place of that which imports torch: its processes print their order, and wait until the end."""
    text = "def work(text, closed):\n    print('was told of', text, flush=True)\n    closed.wait(60)\n"
    (tmp_path / f"{MODULE}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(trial_helpers, "_MODULE", MODULE)
    yield
    dismiss_helpers()


def helpers() -> set[int]:
    """The processes that live."""
    return {child.pid for child in psutil.Process().children() if MODULE in _command(child)}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended since
        return []


def test_as_many_wait_as_are_wanted() -> None:
    """A second call starts those that are missing, and none that is not wanted."""
    start_helpers(-1)
    assert helpers() == set()
    start_helpers(1)
    first = helpers()
    assert len(first) == 1
    start_helpers(2)
    assert len(helpers()) == 2
    assert first < helpers()
    start_helpers(1)
    assert len(helpers()) == 2
    dismiss_helpers()
    assert helpers() == set()


def test_none_is_started_too_late() -> None:
    """Counting GPUs in another thread may take until the trials have begun, or until a sweep has failed at once."""
    since = dismissals()
    with waiting_helpers(1), working_helpers(1, "the order", LOG):
        start_helpers(3, since)
        assert len(helpers()) == 1
    start_helpers(2, since)
    assert helpers() == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_sweep_that_ends_before_its_trials_leaves_none(error: type[BaseException]) -> None:
    """Whatever ends it, and at once."""
    begun = 0.0

    def interrupted() -> None:
        nonlocal begun
        with waiting_helpers(2):
            assert len(helpers()) == 2
            begun = time.monotonic()
            raise error

    with pytest.raises(error):
        interrupted()
    assert helpers() == set()
    assert time.monotonic() - begun < 5


def test_those_that_wait_are_told_and_the_others_end(caplog: pytest.LogCaptureFixture) -> None:
    """No second process is started for one that waits; those without work are gone when the trials begin."""
    caplog.set_level("INFO")
    with waiting_helpers(3):
        waiting = helpers()
        with working_helpers(2, "the order", LOG):
            working = helpers()
            assert len(working) == 2
            assert working < waiting
            for pid in working:
                wait_for("it is told", lambda pid=pid: f"[helper {pid}] was told of the order" in caplog.text, 30)
        assert helpers() == set()
        with working_helpers(1, "the second order", LOG):  # the task is tried again
            (again,) = helpers()
            wait_for("it is told", lambda: f"[helper {again}] was told of the second order" in caplog.text, 30)
    assert "ended with the status" not in caplog.text


def test_none_is_told_where_no_trial_is_left() -> None:
    """All end when that is known."""
    with waiting_helpers(2), working_helpers(0, "the order", LOG):
        assert helpers() == set()


def test_one_that_has_died_while_it_waited(caplog: pytest.LogCaptureFixture) -> None:
    """The sweep goes on with the others, and the log says so at the end."""
    caplog.set_level("INFO")
    with waiting_helpers(2):
        victim = min(helpers())
        os.kill(victim, signal.SIGKILL)
        wait_for("it is dead", lambda: psutil.Process(victim).status() == psutil.STATUS_ZOMBIE, 30)
        with working_helpers(2, "the order", LOG):
            wait_for("the other is told", lambda: "was told of the order" in caplog.text, 30)
    assert f"helper {victim} ended with the status -9" in caplog.text
    assert caplog.text.count("ended with the status") == 1


def test_one_whose_imports_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its traceback is in the log if it was needed; nothing is said of one that was not."""
    caplog.set_level("INFO")
    (tmp_path / f"{MODULE}.py").write_text("import a_module_that_is_not_there")
    with waiting_helpers(1), working_helpers(0, "the order", LOG):
        pass
    assert caplog.text == ""
    with waiting_helpers(1), working_helpers(1, "the order", LOG):
        wait_for("it is told", lambda: "No module named 'a_module_that_is_not_there'" in caplog.text, 30)
    assert "ended with the status 1" in caplog.text


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """The output of a helper goes to the log alone."""
    caplog.set_level("INFO")
    with waiting_helpers(1), working_helpers(1, "the order", LOG):
        wait_for("it works", lambda: "was told of the order" in caplog.text, 30)
    assert capfd.readouterr() == ("", "")
