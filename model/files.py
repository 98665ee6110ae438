"""Files that are either whole or absent: hashes, atomic directories, atomic JSON, tensors."""

from __future__ import annotations

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


def sha256_file(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 in hex of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with scratch.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(scratch, path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, mostly because the disk is full; the message has path and size.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # not an OSError, and without the file's name
        size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        raise OSError(f"cannot write {path}, {size:,} bytes ({free:,} are free there): {error}") from error


# First bytes of what is found in place of data or weights, and what it is.
_CONTENTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"<!doctype html", "an HTML page, perhaps of a login or an error: download the file itself"),
    (b"<html", "an HTML page, perhaps of a login or an error: download the file itself"),
    (b"\x1f\x8b", "compressed by gzip: let its name end with .gz, or unpack it"),
    (b"PK\x03\x04", "a zip archive (also .xlsx, and PyTorch's .pt): unpack or convert it"),
)


def describe_bytes(head: bytes) -> str | None:
    """What a file is, by its first bytes, if it is surely neither text, a table nor safetensors; else None."""
    for magic, description in _CONTENTS:
        if head.lstrip().lower().startswith(magic.lower()):
            return description
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which is never read: it can run code. Convert it where it came from"
    return None


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a scratch directory beside ``target``; it is renamed to ``target`` once the block has succeeded.

    Every file is flushed to disk before the rename, so a directory with its final name is complete.
    An older directory of that name is replaced. After an error nothing of the scratch directory remains.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    scratch.mkdir()
    try:
        yield scratch
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
