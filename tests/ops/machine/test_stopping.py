"""Work that a signal asks to stop, and that ends where it chooses to."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from ops.machine.stopping import run_stoppable


class Told(BaseException):
    """As Prefect's TerminationSignal: no Exception."""


@pytest.fixture
def terminable() -> Iterator[None]:
    """SIGTERM raises in the main thread, as it does in a flow run."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Told

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_waits_for_the_work(terminable: None) -> None:
    """The work is told, ends what it was doing, and only then does the exception go on."""
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    steps = []

    def work(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.02)
        time.sleep(0.3)
        steps.append("saved")
        raise RuntimeError("stopped")

    with pytest.raises(Told):
        run_stoppable(work)
    assert steps == ["saved"]


def test_a_second_signal_changes_nothing(terminable: None) -> None:
    """Impatience does not tear a checkpoint apart."""
    for seconds in (0.2, 0.4):
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    steps = []

    def work(should_stop: Callable[[], bool]) -> None:
        while not should_stop():
            time.sleep(0.02)
        time.sleep(0.6)
        steps.append("saved")

    with pytest.raises(Told):
        run_stoppable(work)
    assert steps == ["saved"]


def test_without_a_signal_it_is_a_call() -> None:
    """The result comes back, an error is raised as it is, and the caller's context is there."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    assert run_stoppable(lambda should_stop: (variable.get(), should_stop())) == ("the caller's", False)
    with pytest.raises(ZeroDivisionError):
        run_stoppable(lambda should_stop: 1 / 0)
