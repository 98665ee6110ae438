"""Processes that are started ahead of their work: they import what it needs, and wait until they are told.

``python -m ops.machine.standby MODULE`` is such a process. It imports MODULE, whose imports take seconds, waits for
one line on stdin, and calls ``MODULE.work(text, closed)``. It ends at once if stdin is closed before, as by the death
of the process that started it. Once it works, the event ``closed`` asks it to end, and it is gone 20 s later.

This file must not import anything slow: until its thread reads stdin, a process does not see that it is not needed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from ops.imports import import_quickly
from ops.machine.stopping import ASKING

_END_SECONDS = 20.0  # in which a process that works ends by itself when its stdin is closed
_STDIN = 0


class Standby:
    """A process that waits for its work; this is the side that starts it.

    The signals that ask a flow run to end do not reach it, not even before Python has started in it.

    Args:
        module: that it imports, and whose function ``work`` it calls.
        environment: of the process, if not that of this one.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None):
        self.environment = dict(os.environ if environment is None else environment)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)  # the process inherits the mask
        try:
            self.process = subprocess.Popen(
                # -P: not a folder "tasks" of the working directory.
                [sys.executable, "-P", "-m", "ops.machine.standby", module],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def pid(self) -> int:
        return self.process.pid

    def give(self, work: str) -> None:
        """Have it call ``work(text, closed)``, in this process's environment; nothing happens if it has died."""
        before, now = self.environment, dict(os.environ)
        changed = {name: now.get(name) for name in {*before, *now} if before.get(name) != now.get(name)}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([changed, work]).encode() + b"\n")
            self.process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """What it prints, until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode(errors="backslashreplace").rstrip()


def dismiss(waiting: Sequence[Standby]) -> None:
    """End processes that have no work: they hold nothing, and need not be asked."""
    for each in waiting:
        each.process.kill()
    for each in waiting:
        each.process.communicate()  # closes the pipes too


def end(working: Sequence[Standby], seconds: float) -> dict[int, int]:
    """Ask processes to end, by closing their stdin, and kill those that have not ended in time.

    Returns:
        The status of each that ended with another one than 0, by its pid.
    """
    for each in working:
        assert each.process.stdin is not None
        with suppress(BrokenPipeError):
            each.process.stdin.close()
    deadline = time.monotonic() + seconds
    failed = {}
    for each in working:
        try:
            status = each.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            status = each.process.wait()
        if status:
            failed[each.pid] = status
    return failed


class _Inbox:
    """What stdin brings: one line of work, then its end.

    Attributes:
        closed: stdin was closed.
    """

    def __init__(self) -> None:
        self.closed = threading.Event()
        self._has_work = threading.Event()
        self._received = b""
        threading.Thread(target=self._watch, name="watch-stdin", daemon=True).start()

    def wait(self) -> tuple[dict[str, str | None], str]:
        """The changes of the environment and the work, once they are there; the process ends if they never come."""
        self._has_work.wait()
        changes, work = json.loads(self._received)
        return changes, work

    def _watch(self) -> None:
        # Not by sys.stdin: Python aborts where a thread holds its lock when the main thread ends.
        while read := os.read(_STDIN, 4096):
            self._received += read
            if self._received.endswith(b"\n"):
                self._has_work.set()
        if not self._has_work.is_set():
            os._exit(0)
        self.closed.set()
        time.sleep(_END_SECONDS)
        os._exit(1)


def main(module: str) -> None:
    """Be such a process."""
    for number in ASKING:  # they may reach every process of a flow run; it decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    inbox = _Inbox()
    imported = import_quickly(module)
    changes, work = inbox.wait()
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    imported.work(work, inbox.closed)


if __name__ == "__main__":
    main(sys.argv[1])
