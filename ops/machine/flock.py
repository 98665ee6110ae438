"""flock: a lock on a file that the kernel frees when the last process that holds it closes the file or dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def hold_file(path: Path, wait: bool) -> Iterator[TextIO | None]:
    """Hold a file's lock against other processes of this machine; the file is made if it does not exist.

    Args:
        wait: until the lock is free. With False a lock that another process holds gives None at once.

    Yields:
        The file, opened to append and to read, which keeps its content; None if another process holds the lock.
    """
    with path.open("a+") as stream:
        if wait:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield stream
        else:
            yield stream if try_lock(stream.fileno()) else None


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Take the lock of an open file without waiting. Returns whether it was free."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
