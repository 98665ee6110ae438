"""Outputs of the trunk in a file that later trainings, and all ranks of a host, use."""

from __future__ import annotations

import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

_VALUES, _CHECKSUMS = "values.bin", "checksums.bin"


class TrunkFile:
    """Outputs in a memory-mapped file, with a second file of one checksum per row, by which damage is detected.

    Raises:
        OSError: the disk has no room for the file.
    """

    def __init__(self, directory: Path, shape: tuple[int, int], rows: int, dtype: torch.dtype):
        directory.mkdir(parents=True, exist_ok=True)
        size = shape[0] * shape[1]
        for name, length in ((_VALUES, size * dtype.itemsize), (_CHECKSUMS, 4 * rows)):
            with (directory / name).open("ab") as stream:
                if stream.tell() != length:
                    stream.truncate(length)
                # Allocate the blocks now: writing to a mapped file on a disk that has become full kills the process
                # (SIGBUS).
                if length and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, length)
        os.utime(directory)  # marks the file as used now
        self.values = torch.from_file(str(directory / _VALUES), shared=True, size=size, dtype=dtype).view(shape)
        self.checksums = np.memmap(directory / _CHECKSUMS, dtype="<u4", mode="r+")

    def is_valid(self, row: int, slots: slice) -> bool:
        """Whether a row's outputs were written, and are undamaged."""
        return self.checksums[row] != 0 and self.checksums[row] == self._checksum(slots)

    def write_checksum(self, row: int, slots: slice) -> None:
        """Mark a row's outputs as written."""
        self.checksums[row] = self._checksum(slots)

    def _checksum(self, slots: slice) -> int:
        """CRC-32, never 0, which stands for a row that was not written."""
        return zlib.crc32(self.values[slots].view(torch.uint8).numpy().data) or 1


def open_trunk_file(
    directory: Path, max_bytes: int, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> TrunkFile | None:
    """Open or create a file of outputs, and delete others to stay within the limit. None if the disk is full.

    Args:
        directory: of the file; its name is the key of the outputs, and the directories of other files are beside it.
        max_bytes: limit for all files together.
        shape: of the outputs.
        rows: number of rows that they are of.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    directory.parent.mkdir(parents=True, exist_ok=True)
    _evict(directory.parent, max_bytes - size, keep=directory)
    exists = directory.exists()
    if not exists and size > 0.5 * shutil.disk_usage(directory.parent).free:
        return None
    try:
        return TrunkFile(directory, shape, rows, dtype)
    except OSError:
        if not exists:
            shutil.rmtree(directory, ignore_errors=True)
        return None


def _evict(root: Path, max_bytes: int, keep: Path) -> None:
    """Delete the files that were not used for the longest time, until the others take ``max_bytes`` at most.

    Args:
        root: directory of all files.
        max_bytes: limit for all files but ``keep``.
        keep: directory of the file that is not deleted.
    """
    used: dict[Path, float] = {}
    sizes: dict[Path, int] = {}
    for path in root.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError):  # another process may delete files at the same time
            if path != keep:
                used[path], sizes[path] = path.stat().st_mtime, (path / _VALUES).stat().st_size
    total = sum(sizes.values())
    for path in sorted(sizes, key=lambda path: used[path]):
        if total <= max_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)  # a process that has the file mapped can go on reading it
        total -= sizes[path]
