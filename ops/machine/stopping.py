"""Work that is asked to stop by a signal, and stops where it chooses to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from ops.threads import in_daemon_thread

T = TypeVar("T")


def run_stoppable(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run ``work(should_stop)`` in a thread; an exception that a signal raises here becomes its request to stop.

    Prefect's handler of SIGTERM raises in the main thread, between any two instructions. It cannot be replaced
    while a flow runs: Prefect tells a cancellation from a mere signal only while its own handler is installed.
    So the main thread has nothing to do but to wait, and what must not be torn apart runs beside it.

    Args:
        work: asks ``should_stop()`` from time to time, and then ends soon, by an exception of its choice.

    Raises:
        BaseException: what the signal raised, once the work has ended; else what the work raised.
    """
    stop, done = threading.Event(), threading.Event()

    def attempt() -> T:
        try:
            return work(stop.is_set)
        finally:
            done.set()

    result = in_daemon_thread(attempt, "stoppable-work")
    interruption: BaseException | None = None
    # An Event: an exception in Thread.join() makes a living thread look dead in Python 3.11 and 3.12.
    while not done.is_set():
        try:
            done.wait(0.5)
        except BaseException as error:
            interruption = interruption or error
            stop.set()
    if interruption is not None:
        raise interruption
    return result.result()
