"""The hashes that this process has found: a file that has not changed since is not read again to be hashed.

A run needs the base's weights three times, and all but the first reading would spend most of its time on the hash.
Another process hashes for itself. A file counts as unchanged while device, inode, size and both times are the same;
on a local file system no program can set the time of the last change (ctime). Writing within one tick of the file
system's clock leaves the times as they are, so a file that was changed just before it was hashed is not remembered
(git does the same with its index, https://git-scm.com/docs/racy-git).

Two changes of the same size are not noticed: bytes that are stored through a shared memory map, which sets the times
at some of the stores only, and on tmpfs at none; and a file whose time was put back where the file system has no
ctime of its own, as sshfs. Copying, downloading and saving do neither.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_TICK_SECONDS = 2.0  # no clock of a file system is coarser
_MOST = 1_000  # files


@dataclass(frozen=True)
class Remembered:
    """What is known of a file's content.

    Attributes:
        sha256: in hex.
        is_checked: whether all values of its tensors were finite.
    """

    sha256: str
    is_checked: bool = False


_Stamp = tuple[int, int, int, int, int]
_files: dict[_Stamp, Remembered] = {}


def stamp_of(status: os.stat_result) -> _Stamp:
    """What changes whenever a file's content does."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def recall(status: os.stat_result) -> Remembered | None:
    """What is known of a file, if it is as it was."""
    return _files.get(stamp_of(status))


def remember(before: os.stat_result, after: os.stat_result, sha256: str, is_checked: bool = False) -> None:
    """Keep a file's hash, unless the file may have changed while it was read or just before.

    Args:
        before: the file's state before it was read.
        after: its state now.
        is_checked: as in ``Remembered``.
    """
    if stamp_of(before) != stamp_of(after) or time.time() - max(after.st_mtime, after.st_ctime) < _TICK_SECONDS:
        return
    if len(_files) >= _MOST:
        _files.clear()
    known = _files.get(stamp_of(after))
    _files[stamp_of(after)] = Remembered(sha256, is_checked or (known is not None and known.is_checked))
