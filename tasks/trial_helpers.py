"""The helpers of a sweep, seen from the process that starts them: one for each further GPU.

They are started when it is known that a sweep will run, so that they import what they need while rows and base are
prepared. They wait without a GPU or a lock, and are told of the sweep when its trials begin. Those that are not
needed then are ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ops.machine.standby import Standby, dismiss, end
from ops.threads import in_daemon_thread

_MODULE = "tasks.trial_helper"
_END_SECONDS = 25.0  # in which a helper ends when it is told to

_lock = threading.RLock()
_waiting: list[Standby] = []  # the helpers of this process that have no work yet
_dismissals = 0


def dismissals() -> int:
    """How often helpers were dismissed: when a sweep has begun its trials, and when it is over."""
    return _dismissals


def start_helpers(count: int, since: int | None = None) -> None:
    """Have as many helpers wait, if fewer do.

    Args:
        since: ``dismissals()`` at the moment when they were wanted; after a later dismissal none is started.
    """
    with _lock:
        while len(_waiting) < count and since in (None, _dismissals):
            _waiting.append(Standby(_MODULE))


def dismiss_helpers() -> None:
    """End the helpers that wait."""
    global _dismissals
    with _lock:
        _dismissals += 1
        dismiss(_waiting)
        _waiting.clear()


@contextmanager
def waiting_helpers(count: int) -> Iterator[None]:
    """Have as many helpers wait during the body; those that still do are ended with it."""
    try:
        start_helpers(count)
        yield
    finally:
        dismiss_helpers()


@contextmanager
def working_helpers(count: int, order: str, log: Any) -> Iterator[None]:
    """Have as many helpers work during the body; in the end they stop, with a checkpoint, or are killed.

    Args:
        order: file of the order that they are given.
        log: a logger, which gets what they print.
    """
    working: list[Standby] = []
    try:
        with _lock:
            start_helpers(count)
            working += _waiting[:count]
            del _waiting[:count]
            dismiss_helpers()
        for helper in working:
            helper.give(order)
            in_daemon_thread(partial(_relay, helper, log), "helper-output")
        yield
    finally:
        for pid, status in end(working, _END_SECONDS).items():
            log.warning("helper %d ended with the status %d", pid, status)


def _relay(helper: Standby, log: Any) -> None:
    """Log what a helper prints."""
    for line in helper.lines():
        log.info("[helper %d] %s", helper.pid, line)
