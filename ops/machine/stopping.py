"""Work that is asked to stop by a signal, and stops where it chooses to."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

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
    thread = _Work(work)
    thread.start()
    interruption: BaseException | None = None
    # Not join(): in Python 3.11 and 3.12 an exception in it makes a living thread look dead.
    while not thread.done.is_set():
        try:
            thread.done.wait(0.5)
        except BaseException as error:
            interruption = interruption or error
            thread.stop.set()
    if interruption is not None:
        raise interruption
    if thread.error is not None:
        raise thread.error
    return thread.result


class _Work(threading.Thread, Generic[T]):
    """The work, in the caller's context: Prefect finds its run there."""

    result: T

    def __init__(self, work: Callable[[Callable[[], bool]], T]):
        super().__init__(name="stoppable-work", daemon=True)
        self.work = work
        self.context = contextvars.copy_context()
        self.stop = threading.Event()
        self.done = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.context.run(self.work, self.stop.is_set)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()
