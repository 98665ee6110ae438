"""Processes by what their environment says: whoever `make up` or `make run` started, and all that they started.

A name proves nothing, and a number is given to another process once its owner is gone; so the mark is looked at
again at the moment of each signal. Linux only (/proc).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ops.machine.process import ProcessMark

_FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # Prefect's worker puts it into the environment of a flow run


@dataclass(frozen=True)
class Process:
    """A living process that carries a mark.

    Attributes:
        pid: its number.
        parent: that of its parent.
        command: the beginning of its command line, for people.
        flow_run: the id of the Prefect flow run that it, or one of its ancestors, executes.
        mark: the variable of its environment by which it was found, and its value.
    """

    pid: int
    parent: int
    command: str
    flow_run: str | None
    mark: tuple[str, str]

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


def marked(name: str, value: str) -> list[Process]:
    """All living processes of this user that were started with the variable ``name`` set to ``value``."""
    return [process for process in _carriers(name) if process.mark[1] == value]


def left_behind(name: str) -> list[Process]:
    """Those whose variable ``name`` holds the mark of a process (``ProcessMark.to_json``) that has died since."""
    found = []
    for process in _carriers(name):
        owner = ProcessMark.from_json(process.mark[1])
        if owner and owner.is_dead:
            found.append(process)
    return found


def _carriers(name: str) -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        environment = _environment(pid)
        if name in environment and pid != os.getpid():
            mark = name, environment[name]
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append(Process(pid, _parent(folder), _command(folder), environment.get(_FLOW_RUN), mark))
    return sorted(found, key=lambda process: process.pid)


def end(find: Callable[[], Iterable[Process]], seconds: float, hurry: Callable[[], bool] = bool) -> list[Process]:
    """Ask the processes that ``find`` gives to end (SIGTERM), wait for them, and kill those that will not.

    Args:
        find: called again and again: what they start meanwhile ends with them.
        seconds: to wait before SIGKILL. Ten seconds after that the rest is given up.
        hurry: true when there is no more time to wait.

    Returns:
        those that were there.
    """
    asked: dict[int, Process] = {}
    deadline = time.monotonic() + seconds
    while (living := list(find())) and time.monotonic() < deadline + 10:
        late = time.monotonic() > deadline or hurry()
        for process in living:
            if late or process.pid not in asked:
                asked[process.pid] = process
                with contextlib.suppress(ProcessLookupError):
                    if process.mark in _environment(process.pid).items():
                        os.kill(process.pid, signal.SIGKILL if late else signal.SIGTERM)
                        os.kill(process.pid, signal.SIGCONT)  # a halted one would not notice
        time.sleep(0.1)
    return list(asked.values())


def _environment(pid: int) -> dict[str, str]:
    """A process's environment as it began; empty for a kernel thread, a zombie, or another user's process."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def _parent(folder: Path) -> int:
    # The name in parentheses may hold anything.
    return int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])


def _command(folder: Path) -> str:
    words = folder.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
    # Without the folders of interpreter and script, in which nobody is interested.
    return " ".join(os.path.basename(word) if word.startswith("/") else word for word in words if word)[:80]
