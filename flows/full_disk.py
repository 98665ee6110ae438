"""A full or read-only disk, as locks, databases and libraries report it: without a path."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

from model.files import DiskFullError
from ops.settings import DataRootError
from ops.text import one_line

_SIGNS = ("No space left on device", "database or disk is full", "Disk quota exceeded")
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NEARLY_FULL = 1_000_000  # bytes


@contextmanager
def naming_the_disk(data_root: Path) -> Iterator[None]:
    """Around a flow run: the error of a full or read-only disk names the data root, its free bytes, and what to do.

    Raises:
        OSError: the disk is full; an error of that kind that has a path already passes.
        DataRootError: a file of the data root may not be written.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if _is_refused(error, data_root):
            raise DataRootError.of(data_root, error) from error
        if not is_full_disk(error, data_root):
            raise
        free = shutil.disk_usage(data_root).free
        raise OSError(
            errno.ENOSPC,
            f"the disk of {data_root} is full, {free:,} bytes are free: free some, and the next run goes on from "
            f"what is complete ({one_line(error)[:300]})",
        ) from error


def _is_refused(error: Exception, data_root: Path) -> TypeGuard[OSError]:
    """Whether the system refuses a file of the data root."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED or not error.filename:
        return False
    return Path(str(error.filename)).is_relative_to(data_root)


def is_full_disk(error: BaseException | None, data_root: Path) -> bool:
    """Whether an error, or one that caused it, is that of a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in _SIGNS):
            return True
        if "disk I/O error" in str(error) and shutil.disk_usage(data_root).free < _NEARLY_FULL:  # sqlite in WAL mode
            return True
        error = error.__cause__ or error.__context__
    return False
