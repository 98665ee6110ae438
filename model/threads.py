"""Threads of a process: how they share Python's global interpreter lock (GIL), and work that is done ahead."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

_SWITCH_SECONDS = 0.0005


def shorten_switch_interval() -> None:
    """Have a thread give the GIL up after 0.5 ms, in place of Python's 5, if another thread waits for it.

    Reading weights and launching kernels releases the GIL hundreds of times a second. While another thread runs
    Python code, such as an import or MLflow's client, getting it back takes one switch interval each time.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)


def begin_ahead(work: Callable[[], object], begun: list[threading.Thread], name: str) -> threading.Thread:
    """Begin work in a daemon thread before it is needed, and add the thread to ``begun``.

    An error is left to who does the work again where it is needed.
    """

    def run() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    begun.append(thread)
    thread.start()
    return thread


def wait_for(begun: Sequence[threading.Thread]) -> None:
    """Wait until all that was begun is done; the threads stay in the list, as any number of threads may wait."""
    for thread in tuple(begun):
        thread.join()
