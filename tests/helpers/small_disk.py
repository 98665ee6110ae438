"""A real file system of a few megabytes, which becomes full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, megabytes: int = 24) -> Iterator[Path]:
    """Mount a tmpfs; the test is skipped where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount on this machine")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted by this user: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a file system with a file, but for some bytes. Returns the file; removing it frees the space."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        free = os.statvfs(disk)
        os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return ballast
