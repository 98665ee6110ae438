"""Lock files: who holds one, taking one without waiting, and the folder that all users share."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from ops.machine.flock import try_lock
from ops.machine.paths import replaceable_part
from ops.machine.process import ProcessIdentity, identify_process, lock_holders

_CONTENT_BYTES = 65536  # of a lock file that are read; every user may write into it
_REMEDY = "remove it, or set FINETUNE_LOCKS to a folder that only root or you can replace"


@dataclass(frozen=True)
class LockState:
    """A lock file as seen by a process that does not hold it.

    Attributes:
        path: the lock file.
        what: the device or training, as the last holder wrote it.
        held: whether a process holds the lock now.
        holder: name of the run that took it last.
        owner: identity of the process that took it last, dead or alive; None if the content cannot be read.
        since: when it was taken last, in ISO 8601.
        flow_run_id: id of that run in Prefect; empty outside of a flow run.
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
        """The processes that hold the lock now, as far as this user may see them."""
        return lock_holders(self.path) if self.held else []

    def describe(self) -> str:
        """The holder, for people; the text continues "held by"."""
        if not self.held:
            return "a process that has just freed it"
        if self.owner is None:
            return "another process"
        run = f"{self.holder} (pid {self.owner.pid}, since {self.since})"
        if not self.owner.is_dead:
            return run
        left = ", ".join(map(str, self.pids)) or "not visible to this user"
        return f"pid {left}, left behind by {run}, which died"


def shared_directory(path: Path) -> Path:
    """Make a directory in which every user of the machine may create lock files, with the mode of /tmp.

    Raises:
        NotADirectoryError: the path is a link or a file.
        PermissionError: another user could replace the directory, or a part of the path to it, by a link.
    """
    if weak := replaceable_part(path):
        raise PermissionError(f"another user can replace {weak}, and with it the lock files in {path}: {_REMEDY}")
    try:
        path.mkdir(parents=True)
        path.chmod(0o1777)
    except FileExistsError:
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(f"{path} is a link or a file, and not a directory: {_REMEDY}") from None
    return path


def read_locks(directory: Path) -> list[LockState]:
    """The state of every lock file in a directory."""
    return [read_lock(path) for path in sorted(directory.glob("*.lock"))]


def lock_path(directory: Path, what: str) -> Path:
    """The lock file of a device or a training."""
    return directory / f"{what.replace(':', '-').replace(' ', '-')}.lock"


def write_holder(what: str, descriptor: int, holder: str, flow_run_id: str) -> None:
    """Write into a lock file that was taken who holds it."""
    content = {
        "what": what,
        "holder": holder,
        "flow_run_id": flow_run_id,
        "process": identify_process().to_json(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode(), 0)


def _open(path: Path) -> int:
    """Open a lock file to read and write, and create it if it does not exist.

    Raises:
        OSError: the file or its folder is a link, also one that was put there a moment ago.
        PermissionError: the file is not a plain file, or has a second name, which may be that of another file.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        descriptor = _open_in(folder, path.name)
    except OSError as error:  # it names the file without its folder
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise PermissionError(f"the lock file {path} is not a plain file with one name: remove it")
    return descriptor


def _open_in(folder: int, name: str) -> int:
    while True:
        try:
            # Linux may refuse O_CREAT on another user's file in a directory like /tmp, even if it is writable.
            return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        except FileNotFoundError:
            pass
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        except FileExistsError:
            continue
        os.fchmod(descriptor, 0o666)  # os.open's mode is reduced by the umask
        return descriptor


def take_lock(path: Path) -> int | None:
    """Lock a file without waiting. Returns its descriptor, which the caller closes; None if it is held."""
    descriptor = _open(path)
    try:
        # A cleaner of /tmp may have removed the file since it was opened.
        if try_lock(descriptor) and path.exists() and os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def read_lock(path: Path) -> LockState:
    """The state of a lock file; it is held for an instant meanwhile, shared with other readers."""
    held = False
    try:
        # Without O_NONBLOCK a pipe in place of the file would hang this process.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            held = not try_lock(descriptor, shared=True)
            content = json.loads(os.pread(descriptor, _CONTENT_BYTES, 0))
        finally:
            os.close(descriptor)
        owner = ProcessIdentity.from_json(content["process"])
        texts = [str(content[key]) for key in ("what", "holder", "since", "flow_run_id")]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        owner, texts = None, [path.stem, "", "", ""]
    what, holder, since, flow_run_id = texts
    return LockState(path, what, held, holder, owner, since, flow_run_id)
