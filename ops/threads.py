"""Daemon threads with a result.

concurrent.futures joins the threads of its pools when the interpreter exits, so a call that hangs would keep the
process alive. A daemon thread is left behind instead.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Start ``work()`` in a daemon thread of that name, in a copy of the caller's context variables.

    Prefect finds the current flow run in the context. The future has the result, or what ``work`` raised, a
    BaseException included; cancelling it has no effect on the thread.
    """
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
