"""Work that a signal asks to stop, and that ends at a point of its own choice."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from ops.machine.stopping import insistent_signals, run_stoppable


class Stopped(BaseException):
    """Like Prefect's TerminationSignal, which is no Exception."""


@pytest.fixture
def terminable() -> Iterator[None]:
    """SIGTERM raises in the main thread, as it does in a flow run."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_waits_for_the_work(terminable: None) -> None:
    """``should_stop()`` becomes true, the work ends, and only then the signal's exception is raised."""
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    steps = []

    def work(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.02)
        time.sleep(0.3)
        steps.append("saved")
        raise RuntimeError("stopped")

    with pytest.raises(Stopped):
        run_stoppable(work)
    assert steps == ["saved"]


def test_a_second_signal_changes_nothing(terminable: None) -> None:
    """It does not interrupt the saving of a checkpoint."""
    for seconds in (0.2, 0.4):
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    steps = []

    def work(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.02)
        time.sleep(0.6)
        steps.append("saved")

    with pytest.raises(Stopped):
        run_stoppable(work)
    assert steps == ["saved"]


def test_without_a_signal_the_work_is_just_called() -> None:
    """Its result is returned, its error is raised, and it has the caller's context."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    assert run_stoppable(lambda should_stop: (variable.get(), should_stop())) == ("the caller's", False)
    with pytest.raises(ZeroDivisionError):
        run_stoppable(lambda should_stop: 1 / 0)


def _import_badly(number: int, then: Exception | None) -> None:
    """What an import does that catches every error: it goes on, and perhaps fails later."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    except BaseException:
        if then:
            raise then from None


@pytest.mark.parametrize("then", [None, RecursionError("half a module")])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_a_lost_signal_is_raised_again(
    terminable: None, number: int, error: type[BaseException], then: Exception | None
) -> None:
    """In place of the later error, too; the handlers are those of before."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(error), insistent_signals():
        _import_badly(number, then)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RecursionError), insistent_signals():  # without a signal nothing is changed
        raise RecursionError
    with insistent_signals():
        pass
