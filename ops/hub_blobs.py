"""The files of a hub's cache: blobs, which are named by the hub's hash of their content, and parts of them."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from model.files import sha256_file

HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # the hub's hash of a file in git (sha1) or in LFS (sha256)


def part_files(blobs: Path, expected: str) -> dict[Path, os.stat_result]:
    """Return the part files of one blob, those of other processes included.

    Args:
        blobs: folder of a repository's blobs.
        expected: name of the blob.
    """
    parts = {}
    for path in blobs.glob(f"{expected}.*.incomplete"):
        with suppress(FileNotFoundError):  # finished and renamed since it was listed
            parts[path] = path.stat()
    return parts


def name_of_blob(path: Path) -> str | None:
    """Return the name of the blob to which a file of a snapshot links: the hub's hash of its content.

    Only one link is followed: a blob may itself link into the cache's store for Xet, where the names look like a
    sha256 but are another hash. A cache without links (Windows) has no such names.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if HASH.fullmatch(name) else None


def blob_hash(path: Path, like: str) -> str:
    """Hash a file as the hub does: by sha256 (LFS), or as a git blob id if ``like`` has 40 digits."""
    if len(like) == 40:  # small files only
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sha256_file(path)
