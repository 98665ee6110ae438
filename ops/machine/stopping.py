"""Work that a signal asks to stop, and that ends at a point of its own choice, such as after a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from ops.threads import in_daemon_thread

T = TypeVar("T")
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what asks a flow run, or a process of it, to end


def run_stoppable(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run ``work(should_stop)`` in a thread; an exception that a signal raises here makes ``should_stop()`` true.

    Prefect's handler of SIGTERM raises an exception in the main thread, between any two instructions. It cannot be
    replaced while a flow runs: only with its own handler does Prefect tell a cancellation from other signals. So the
    main thread only waits, and work that must not be interrupted half-way, such as writing a checkpoint, runs in
    another thread.

    Args:
        work: calls ``should_stop()`` regularly; once that is true it ends soon, by returning or by an exception.

    Returns:
        What the work returned.

    Raises:
        BaseException: the exception of the first signal, after the work has ended; without a signal, what the work
            raised.
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


@contextmanager
def insistent_signals() -> Iterator[None]:
    """Raise at its end what the handler of SIGINT or SIGTERM raised within the block, if it was lost.

    Imports of torch and numpy catch every exception: they go on with half a module, and fail much later with another
    error. To be used in the main thread, as signal.signal is.
    """
    raised: list[BaseException] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handlers[signal.Signals(number)](number, frame)  # type: ignore[operator, misc]
        except BaseException as error:
            raised.append(error)
            raise

    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, handle)
    try:
        yield
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
    if raised:
        raise raised[0]
