"""Which process is meant by a pid written down earlier, and which processes hold a lock file."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessMark:
    """A process that no later one can be mistaken for.

    Attributes:
        host: name of the machine, for people.
        machine: what identifies the machine: its machine-id, else its name.
        boot: identifies the time since it was started; with it, what pids mean (a container has its own).
        pid: of the process.
        started: when it was started, in the system's own unit; pids are used again.
    """

    host: str
    machine: str
    boot: str
    pid: int
    started: str

    def to_json(self) -> str:
        """One line, for a tag or a lock file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessMark | None:
        """What to_json wrote; None for anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def is_dead(self) -> bool:
        """True only if it is certain: the machine is this one, and was restarted or no longer has the process."""
        return self._lives() is False

    @property
    def is_alive(self) -> bool:
        """True only if it is certain: this machine, here where pids mean the same, has the process."""
        return self._lives() is True

    def _lives(self) -> bool | None:
        here = mark_process(self.pid)
        if self.machine != here.machine:
            return None
        boot, _, namespace = self.boot.partition(" ")
        boot_now, _, namespace_now = here.boot.partition(" ")
        if boot != boot_now:
            return False
        # In another container the same number is another process.
        return self.started == here.started if namespace == namespace_now else None


def mark_process(pid: int | None = None) -> ProcessMark:
    """The mark of a process of this machine, by default this one; its ``started`` is empty if there is none."""
    pid = os.getpid() if pid is None else pid
    return ProcessMark(socket.gethostname(), _machine(), _boot(), pid, _started(pid))


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
    try:
        # The name in parentheses may hold anything; the 20th field behind it is the start in clock ticks.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        if (_PROC / "self/stat").exists():
            return ""
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return done.stdout.strip()
    return "" if fields[0] in "ZX" else fields[19]


def command_line(pid: int) -> str:
    """A process's command, cut at 80 characters; empty where it cannot be read."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode(errors="replace") for word in words).strip()[:80]


def lock_holders(path: Path) -> list[int]:
    """The living processes that hold a file's flock, those included that inherited it.

    Only those of users whose descriptors may be read; on other systems than Linux none.
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
        except OSError:  # another user's, or gone
            continue
    return sorted(found)


def _locks(fdinfo: Path, file: os.stat_result) -> bool:
    """Whether a descriptor, given by its file in /proc/*/fdinfo, has the flock of a file."""
    try:
        if not re.search(r"^lock:.*FLOCK", fdinfo.read_text(), re.MULTILINE):
            return False
        # Inodes repeat from device to device, and the device that fdinfo names is on btrfs not the one of stat.
        return os.path.samestat((fdinfo.parents[1] / "fd" / fdinfo.name).stat(), file)
    except FileNotFoundError:  # closed meanwhile; the process may have the lock by another
        return False
