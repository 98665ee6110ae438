"""Files that are either whole or absent: hashes, atomic directories, atomic JSON, tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 in hex of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class DiskFullError(OSError):
    """A file cannot grow: the disk is full, or a quota or a size limit is reached. The message has path and bytes."""

    def __init__(self, path: Path, needed: int | None, reason: str):
        size = "" if needed is None else f", {needed:,} bytes"
        super().__init__(
            f"cannot write {path}{size} ({_free_bytes(path):,} are free there): {reason}. Free some space; the next "
            "run goes on from what is complete"
        )


@contextmanager
def naming_a_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Around writing a file: without it, the error of a full disk has no path.

    Args:
        path: file or directory that is written.
        needed: its bytes, if they are known.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(path, needed, str(error.strerror)) from error


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step.

    Raises:
        DiskFullError: the disk is full; the old file is unchanged.
    """
    text = json.dumps(value, indent=1)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with naming_a_full_disk(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, mostly because the disk is full; the message has path and size.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # not an OSError, and without the file's name
        raise DiskFullError(path, sum(tensor.nbytes for tensor in tensors.values()), str(error)) from error


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch directory beside ``target``; it is renamed to ``target`` once the block has succeeded.

    Every file is flushed to disk before the rename, so a directory with its final name is complete.
    An older directory of that name is replaced. After an error nothing of the scratch directory remains.

    Raises:
        DiskFullError: the block, or what follows it, met a full disk.
    """
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with naming_a_full_disk(target), _replacing(target, scratch):
        yield scratch


@contextmanager
def _replacing(target: Path, scratch: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch.mkdir()
    try:
        yield
        for path in [*scratch.rglob("*"), scratch]:
            _fsync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            os.rename(target, old)
            os.rename(scratch, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(scratch, target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_strays(directory: Path) -> None:
    """Delete the scratch directories and files that a killed writer left in ``directory``.

    Only for a directory that a single process writes to at a time.
    """
    for path in directory.glob(".*"):
        if path.is_dir() and path.name.endswith(".tmp"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file():
            path.unlink(missing_ok=True)
