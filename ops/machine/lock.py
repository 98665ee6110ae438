"""One at a time on a device or a training: lock files that the kernel frees the instant their holder dies.

The kernel's flock decides who holds a device; what the file says is only for those who wait. A lock lives as long
as any process that has its descriptor: a child that works on the device is started with ``pass_fds`` and keeps it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops.machine.flock import try_lock
from ops.machine.process import ProcessIdentity, identify_process, lock_holders

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0  # between looks at who holds it: whose process died is searched for in all of /proc


@dataclass(frozen=True)
class Held:
    """A lock that is held.

    Attributes:
        what: the device or training.
        descriptor: to be passed on to children that work on it.
    """

    what: str
    descriptor: int


@dataclass(frozen=True)
class LockState:
    """What can be said about a lock file from outside.

    Attributes:
        path: of the file.
        what: the device or training, as its last holder wrote it.
        held: whether anybody holds it now.
        holder: name of the run that took it last.
        owner: its process, dead or alive.
        since: when it took it.
        flow_run_id: its Prefect run.
    """

    path: Path
    what: str
    held: bool
    holder: str
    owner: ProcessIdentity | None
    since: str
    flow_run_id: str

    @property
    def pids(self) -> list[int]:
        """The processes that hold it now, as far as this user can see them."""
        return lock_holders(self.path) if self.held else []

    def describe(self) -> str:
        """Who holds it, for people."""
        if not self.held:
            return f"{self.what} is free"
        if self.owner is None:
            return "another process"
        who = f"{self.holder} (pid {self.owner.pid}, since {self.since})"
        if not self.owner.is_dead:
            return who
        left = ", ".join(map(str, self.pids)) or "not visible to this user"
        return f"what {who} left behind when it died: pid {left}"


@contextmanager
def exclusive(
    directory: Path,
    what: str,
    holder: str,
    log: Callable[[str], None],
    remind_seconds: float = 60,
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
) -> Iterator[Held]:
    """Hold one thing; see ``exclusive_any``."""
    with exclusive_any(directory, [what], holder, log, remind_seconds, show, flow_run_id) as held:
        yield held


@contextmanager
def exclusive_any(
    directory: Path,
    whats: Sequence[str],
    holder: str,
    log: Callable[[str], None],
    remind_seconds: float = 60,
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
) -> Iterator[Held]:
    """Hold the first of several things that is free; wait while none is, and say for whom.

    Args:
        directory: where the lock files lie.
        whats: devices by a name of the hardware, or a training; the first free one is taken, in this order.
        holder: shown to those who wait.
        log: told when waiting begins, whenever it is for somebody else, and again every ``remind_seconds``.
        show: told the same, but no reminders; and None when waiting is over.
        flow_run_id: Prefect's id of the holder.

    Raises:
        PermissionError: a lock file of another user cannot be opened; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    told, told_at, looked_at = "", 0.0, 0.0
    taken = _take_first(directory, whats)
    if taken is None:  # perhaps somebody only looked whether the lock is held
        time.sleep(0.1)
        taken = _take_first(directory, whats)
    while taken is None:
        now = time.monotonic()
        if not told or now - looked_at > _LOOK_SECONDS:
            looked_at = now
            message = _waiting_for(directory, whats)
            if message != told:
                show(message)
            if message != told or now - told_at > remind_seconds:
                log(message)
                told, told_at = message, now
        time.sleep(_POLL_SECONDS)
        taken = _take_first(directory, whats)
    what, descriptor = taken
    try:
        content = {
            "what": what,
            "holder": holder,
            "flow_run_id": flow_run_id,
            "process": identify_process().to_json(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        if told:
            log(f"{what} is free: going on")
            show(None)
        yield Held(what, descriptor)
    finally:
        # Not unlocked: a child that inherited the descriptor may still be at work.
        os.close(descriptor)


def shared_directory(path: Path) -> Path:
    """Make a directory in which every user of the machine may lock, as /tmp is one.

    Raises:
        NotADirectoryError: it is a link or a file.
    """
    try:
        path.mkdir(parents=True)
        path.chmod(0o1777)
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(f"{path} is no directory: remove it, or set FINETUNE_LOCKS") from None
    return path


def read_locks(directory: Path) -> list[LockState]:
    """The state of every lock file in a directory."""
    return [_read(path) for path in sorted(directory.glob("*.lock"))]


def _path(directory: Path, what: str) -> Path:
    return directory / f"{what.replace(':', '-').replace(' ', '-')}.lock"


def _take_first(directory: Path, whats: Sequence[str]) -> tuple[str, int] | None:
    for what in whats:
        descriptor = _try(_path(directory, what))
        if descriptor is not None:
            return what, descriptor
    return None


def _open(path: Path) -> int:
    while True:
        try:
            # Linux may refuse O_CREAT on another user's file in a directory like /tmp, even if it is writable.
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        os.fchmod(descriptor, 0o666)  # whatever the umask
        return descriptor


def _try(path: Path) -> int | None:
    descriptor = _open(path)
    try:
        # A cleaner of /tmp may have removed the file since it was opened.
        if try_lock(descriptor) and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _read(path: Path) -> LockState:
    held = False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            held = not try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)
        content = json.loads(path.read_text())
        owner = ProcessIdentity.from_json(content["process"])
        texts = [str(content[key]) for key in ("what", "holder", "since", "flow_run_id")]
    except (OSError, ValueError, LookupError, TypeError):
        owner, texts = None, [path.stem, "", "", ""]
    what, holder, since, flow_run_id = texts
    return LockState(path, what, held, holder, owner, since, flow_run_id)


def _waiting_for(directory: Path, whats: Sequence[str]) -> str:
    held = []
    for what in whats:
        path = _path(directory, what)
        held.append(f"{what}, held by {_read(path).describe()} ({path})")
    return f"waiting for {' or '.join(held)}"
