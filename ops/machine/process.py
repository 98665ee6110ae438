"""Processes of this machine: identified so that a reused pid is noticed, found by a variable, ended.

``make up`` and ``make run`` set a variable in the environment of what they start, and all children inherit it.
Neither a command's name nor a pid proves anything: names are free, and a pid is used again once its process is gone.
So a process found by its variable is identified, and the identity is compared at the moment of each signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from model.records import parse_record

_PROC = Path("/proc")
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"  # Prefect's worker sets it in the environment of a flow run
_PR_SET_PDEATHSIG = 1  # see prctl(2)
_GIVE_UP_SECONDS = 10.0  # after SIGKILL: a process in an uninterruptible system call may not end


@dataclass(frozen=True)
class ProcessIdentity:
    """Identifies a process among all that ever run, on this machine and on others.

    Attributes:
        host: name of the machine.
        machine: the machine-id, or the host's name where there is no machine-id.
        boot: the boot id and the pid namespace, separated by a blank; empty on other systems than Linux.
        pid: the process id in that namespace.
        started: start time; clock ticks since boot as decimal digits, on other systems what ``ps`` prints.
    """

    host: str
    machine: str
    boot: str
    pid: int
    started: str

    def to_json(self) -> str:
        """One line, for a tag, an environment variable or a lock file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessIdentity | None:
        """Read what to_json wrote; None for any other text."""
        try:
            return parse_record(text, cls, "the process")
        except ValueError:
            return None

    @property
    def is_dead(self) -> bool:
        """True only if it is certain: this machine was restarted since, or no longer has the process."""
        return self._state() == "dead"

    @property
    def is_alive(self) -> bool:
        """True only if it is certain: this machine has the process, in this pid namespace."""
        return self._state() == "alive"

    def _state(self) -> Literal["alive", "dead", "unknown"]:
        """Whether the process lives; "unknown" for a process of another machine or another container."""
        here = identify_process(self.pid)
        # Machines that were set up from one image may have the same machine-id.
        if (self.machine, self.host) != (here.machine, here.host):
            return "unknown"
        boot, _, namespace = self.boot.partition(" ")
        boot_now, _, namespace_now = here.boot.partition(" ")
        if boot != boot_now:
            return "dead"
        if namespace != namespace_now:  # the same pid means another process there
            return "unknown"
        return "alive" if self.started == here.started else "dead"


def identify_process(pid: int | None = None) -> ProcessIdentity:
    """The identity of a process of this machine, by default this one; ``started`` is empty if it does not live."""
    pid = os.getpid() if pid is None else pid
    return ProcessIdentity(socket.gethostname(), _machine(), _boot(), pid, _started(pid))


@functools.cache
def _machine() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip() or socket.gethostname()
    except OSError:
        return socket.gethostname()


def _boot() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:  # not Linux: start times alone tell processes apart
        return ""


def _started(pid: int) -> str:
    """The start time of a process; empty if there is none with that pid, or only a zombie.

    Read by hand: psutil's create_time() adds the boot time, which follows the clock, and gives a rounded float.
    Identities in MLflow's tags and in lock files hold the kernel's own clock ticks and are compared exactly.
    """
    try:
        # The command's name, in parentheses, may hold blanks and parentheses. Behind it the first field is the
        # state, and the 20th the start time (proc_pid_stat(5)).
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        if (_PROC / "self/stat").exists():
            return ""
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return done.stdout.strip()
    return "" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Process:
    """A process that was alive when it was found.

    Attributes:
        identity: tells whether it still lives.
        parent: pid of its parent.
        arguments: its command line.
        flow_run: id of the Prefect flow run that it or one of its ancestors executes; None outside of a flow run.
    """

    identity: ProcessIdentity
    parent: int
    arguments: tuple[str, ...]
    flow_run: str | None

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def command_line(self) -> str:
        """Its command, cut at 80 characters; empty where it cannot be read."""
        return " ".join(self.arguments).strip()[:80]

    @property
    def command(self) -> str:
        """Its command without the folders of interpreter and script, cut at 80 characters."""
        words = [os.path.basename(word) if word.startswith("/") else word for word in self.arguments if word]
        return " ".join(words)[:80]

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


def find_process(pid: int) -> Process | None:
    """The living process with this pid; None if there is none."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return _describe(process, _environment(process))
    return None


def tagged(name: str, value: str) -> list[Process]:
    """All other living processes of this user that were started with the variable ``name`` set to ``value``."""
    return [process for found, process in _with_variable(name) if found == value]


def left_behind(name: str) -> list[Process]:
    """Those whose variable ``name`` holds the identity (ProcessIdentity.to_json) of a process that has died."""
    found = []
    for value, process in _with_variable(name):
        owner = ProcessIdentity.from_json(value)
        if owner and owner.is_dead:
            found.append(process)
    return found


def die_with_parent() -> None:
    """Have the kernel kill this process (SIGKILL) when the thread that started it ends; on Linux only.

    A parent that ended before this call is not noticed.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)


def end_processes(
    find: Callable[[], Iterable[Process]], seconds: float, hurry: Callable[[], bool] = lambda: False
) -> list[Process]:
    """Ask processes to end (SIGTERM), wait for them, and kill those that remain (SIGKILL).

    Args:
        find: gives the processes that should end. It is called again every 0.1 s, so that what they start meanwhile
            ends with them; the call returns when ``find`` gives none that lives.
        seconds: from SIGTERM to SIGKILL. Ten seconds after SIGKILL the remaining ones are given up.
        hurry: true if SIGKILL should not wait for ``seconds``.

    Returns:
        Every process that was signalled, in the order of the first signal.

    Raises:
        PermissionError: a process belongs to another user.
    """
    asked: dict[ProcessIdentity, Process] = {}
    deadline = time.monotonic() + seconds
    while (living := list(find())) and time.monotonic() < deadline + _GIVE_UP_SECONDS:
        late = time.monotonic() > deadline or hurry()
        for process in living:
            if (late or process.identity not in asked) and process.identity.is_alive:
                asked[process.identity] = process
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL if late else signal.SIGTERM)
                    os.kill(process.pid, signal.SIGCONT)  # a stopped process does not handle SIGTERM
        time.sleep(0.1)
    return list(asked.values())


def _with_variable(name: str) -> Iterator[tuple[str, Process]]:
    """The value of a variable and the process, for each other living process that has it, ordered by pid."""
    for pid in sorted(psutil.pids()):
        with contextlib.suppress(psutil.Error):  # gone since it was listed
            handle = psutil.Process(pid)
            environment = _environment(handle)
            if name in environment and pid != os.getpid() and (process := _describe(handle, environment)):
                yield environment[name], process


def _describe(process: psutil.Process, environment: Mapping[str, str]) -> Process | None:
    """Describe a process with its environment; None if it is dead."""
    described = Process(
        identify_process(process.pid), process.ppid(), tuple(process.cmdline()), environment.get(FLOW_RUN_VARIABLE)
    )
    # Looked at last: the environment was read before, and must not be that of an earlier process with this pid.
    return described if described.identity.started and process.is_running() else None


def _environment(process: psutil.Process) -> dict[str, str]:
    """A process's environment as it began; empty for a zombie, a kernel thread or another user's process."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def lock_holders(path: Path) -> list[int]:
    """The pids of the living processes that hold a file's flock, those included that inherited it.

    Only processes whose descriptors this user may read; on other systems than Linux none.
    """
    try:
        file = path.stat()
    except OSError:
        return []
    found = []
    for process in _PROC.glob("[0-9]*"):
        try:
            if any(_locks(entry, file) for entry in (process / "fdinfo").iterdir()):
                found.append(int(process.name))
        except OSError:  # another user's process, or one that has ended
            continue
    return sorted(found)


def _locks(fdinfo: Path, file: os.stat_result) -> bool:
    """Whether a descriptor, given by its file in /proc/*/fdinfo, has the flock of a file."""
    try:
        if not re.search(r"^lock:.*FLOCK", fdinfo.read_text(), re.MULTILINE):
            return False
        # Inodes repeat between devices, and on btrfs the device in fdinfo differs from that of stat.
        return os.path.samestat((fdinfo.parents[1] / "fd" / fdinfo.name).stat(), file)
    except FileNotFoundError:  # closed meanwhile; the process may hold the lock by another descriptor
        return False
