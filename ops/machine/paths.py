"""Paths that other users of the machine could lead elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_LINKS = 40  # as many as the kernel follows


def replaceable_part(path: Path) -> Path | None:
    """The first part of a path that another user could replace by a link; None if there is none.

    Trusted are root, the user of this process, and the owner of ``/``. A folder is safe if one of them owns it and no
    other user may write into it. In a folder like /tmp (mode 1777) an entry is safe if one of them owns the entry.
    The last part may be another user's folder in one like /tmp: it is meant to be shared, and the caller opens it
    without following a link. Links on the way are followed. A part that does not exist is safe.

    Raises:
        OSError: more links than the kernel follows.
    """
    trusted = {0, os.geteuid(), Path("/").stat().st_uid}
    here, parts, links = Path("/"), list(path.absolute().parts[1:]), 0
    while parts:
        folder, name = here.lstat(), parts.pop(0)
        writable = bool(folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if folder.st_uid not in trusted or (writable and not folder.st_mode & stat.S_ISVTX):
            return here
        entry = Path(os.path.normpath(here / name))  # here has no links, so ".." is its parent
        if not parts or not os.path.lexists(entry):
            return None
        found = entry.lstat()
        if writable and found.st_uid not in trusted:
            return entry
        if not stat.S_ISLNK(found.st_mode):
            here = entry
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(entry))
        parts = [*target.parts[1:], *parts] if target.is_absolute() else [*target.parts, *parts]
        here = Path("/") if target.is_absolute() else here
    return None
