"""Files that are either whole or absent: hashes, atomic directories, atomic JSON, tensors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from model.file_contents import HEAD_BYTES, describe_bytes
from model.file_memory import recall, remember

if TYPE_CHECKING:
    from torch import Tensor

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: Path) -> str:
    """The file's sha256 in hex; it is read only if this process has not hashed it before (model.file_memory).

    Raises:
        OSError: it cannot be read, or is no file.
    """
    check_plain(path)
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if known := recall(status):
            return known.sha256
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        remember(status, os.fstat(stream.fileno()), found)
        return found


def leads_outside(path: str) -> bool:
    """Whether a relative path that a file or a server gives leaves the folder that it is joined to."""
    return "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def plain_name(name: object, source: object) -> str:
    """The name of a file in a folder, as another file or a server gives it.

    Args:
        source: who gives it, for the message.

    Raises:
        ValueError: it would lead out of the folder, or is no name.
    """
    if not isinstance(name, str) or not name or leads_outside(name) or "/" in name:
        raise ValueError(f"{source} names a file outside its directory: {shown(name)}")
    return name


def sha256_json(value: Any) -> str:
    """The sha256 in hex of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class DiskFullError(OSError):
    """A file cannot grow: the disk is full, or a quota or a size limit is reached. The message has path and bytes."""

    def __init__(self, path: Path, needed: int | None, reason: str):
        size = "" if needed is None else f", {needed:,} bytes"
        super().__init__(
            f"cannot write {path}{size} ({_free_bytes(path):,} bytes are free there): {reason}: free some space, and "
            "the next run goes on from what is complete"
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
        cut_short = error.errno is None and str(error).endswith(" written")  # numpy's, without a number
        if error.errno not in _FULL and not cut_short:
            raise
        raise DiskFullError(path, needed, error.strerror or os.strerror(errno.ENOSPC)) from error


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
    """Write a safetensors file, with the permissions of any other new file.

    Raises:
        OSError: it cannot be written, mostly because the disk is full; the message has path and size.
    """
    from safetensors import SafetensorError  # here: this module is imported where no torch is needed
    from safetensors.torch import save_file

    size = sum(tensor.nbytes for tensor in tensors.values())
    with naming_a_full_disk(path, size):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:  # not an OSError, and without the file's name
            raise DiskFullError(path, size, str(error)) from error
        path.chmod(mode)  # the library leaves 0600, whatever the umask is (safetensors#782)


class ChangedFileError(ValueError):
    """A file is no longer what it was when the run began."""

    def __init__(self, path: Path, expected: str | None, found: str):
        then = f"then {expected}" if expected else "it was not there then"
        super().__init__(
            f"{path} has changed since this run began: its sha256 is {found}, {then}. Restore the file, or start a "
            "new run with it"
        )


def read_bytes(path: Path, sha256: str | None = None) -> bytes:
    """A small file's content.

    Args:
        sha256: what its hash has to be; None for any.

    Raises:
        OSError: it cannot be read, or is no file.
        ChangedFileError: it has another hash.
    """
    check_plain(path)
    content = path.read_bytes()
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ChangedFileError(path, sha256, found)
    return content


def is_plain_file(path: Path) -> bool:
    """Whether there is a file, or a link to one. A name that no file can have, such as a long one, is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def path_of(parameter: str, value: str) -> Path:
    """The absolute path that a parameter names, without links.

    Raises:
        ValueError: no file can have that path, its user is unknown, or its links are a circle.
    """
    try:
        path = Path(value).expanduser().resolve()
        path.lstat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{parameter} {shown(value)} is not a path: {reason_of(error)}") from error
    return path


def check_plain(path: Path) -> None:
    """Refuse what is there and no file: a pipe would be read for ever, and so would a device.

    Raises:
        OSError: the message names the path.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))


def shown(value: Any, most: int = 100) -> str:
    """A value that a file has, for a message: on one line, and cut where it is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, most, most  # repr itself never ends for some YAML
    try:
        text = short.repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def shown_bare(text: str) -> str:
    """A name that a file has, for a message: as it is, if it is short and can be printed, else as ``shown``."""
    return text if text.isprintable() and len(text) <= 100 else shown(text)


def reason_of(error: BaseException) -> str:
    """The message of a library's error for a sentence of one's own: on one line, and cut where it is long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``object_pairs_hook``.

    Raises:
        ValueError: a key is there twice, so that one of its values would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {shown(twice)} twice")
    return found


def parse_json(content: bytes, path: Path) -> Any:
    """The value of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        path: named in errors.

    Raises:
        ValueError: it is no JSON, and the message says what it is instead; or an object has a key twice.
    """
    other = describe_bytes(content[:HEAD_BYTES]) if content else "an empty file: copy or download it again"
    if other:
        raise ValueError(f"{path} is not valid JSON: it is {other}")
    try:
        return json.loads(content.decode(json.detect_encoding(content)), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: it is not {error.encoding.upper()}, save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


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
