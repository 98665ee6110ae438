"""A safetensors file, read once from its beginning to its end and hashed on the way.

The library's own reader maps the file into memory. What is hashed may then differ from what is used, if the file is
written to in between. Format: https://huggingface.co/docs/safetensors (8 bytes with the header's length, a JSON
header, the tensors' bytes without gaps).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.file_contents import describe_content
from model.file_memory import recall, remember, stamp_of
from model.files import shown, unique_keys

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes of one value; a dtype that is not listed, such as one of four bits, is not checked against its size.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LONGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor's place in the file, in bytes behind the header.

    Attributes:
        dtype: the format's name, such as F32, BF16 or I8.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file.

    Attributes:
        entries: key -> place of each tensor, in the order of the file.
        is_checked: whether this process has read the file before, and found its values finite.
        sha256: of the whole file; empty until ``tensors`` has come to the end.
    """

    def __init__(self, path: Path, stream: BinaryIO):
        self.path = path
        self.sha256 = ""
        self._stream = stream
        self._status = os.fstat(stream.fileno())
        self._known = recall(self._status)
        self.is_checked = self._known is not None and self._known.is_checked
        self._digest = hashlib.sha256()
        self.entries = self._read_header()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of a dtype in FLOATS with its key, on the CPU, in the order of the file. All bytes are read.

        A tensor is valid until the next one; it must not be changed. Its bytes are hashed in a thread, while the
        caller works with it and while the next one is read into other memory. They are not hashed again if this
        process has hashed the file before, and it has not changed since.

        Raises:
            ValueError: the file became shorter.
        """
        longest = max((entry.end - entry.begin for entry in self.entries.values()), default=0)
        # Two for all tensors, in turn: fresh memory costs more than reading.
        scratch = [torch.empty(longest, dtype=torch.uint8) for _ in range(2)]
        with ThreadPoolExecutor(1, "hash-weights") as thread:
            hashing = thread.submit(lambda: None)
            for number, (key, entry) in enumerate(self.entries.items()):
                content = scratch[number % 2][: entry.end - entry.begin]
                self._fill(content.numpy().data)
                if not self._known:
                    hashing.result()  # of the tensor before: the next one goes into its memory
                    hashing = thread.submit(self._digest.update, content.numpy().data)
                if entry.dtype in FLOATS:
                    yield key, content.view(FLOATS[entry.dtype]).view(entry.shape)
        if not self._known:
            self.sha256 = self._digest.hexdigest()
        elif stamp_of(os.fstat(self._stream.fileno())) == stamp_of(self._status):
            self.sha256 = self._known.sha256
        else:
            self.sha256 = "unknown, as it was written to while it was read"

    def keep_as_checked(self) -> None:
        """Remember that all values are finite; to be called after ``tensors`` has come to the end."""
        remember(self._status, os.fstat(self._stream.fileno()), self.sha256, is_checked=True)

    def _fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            count = self._stream.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise self._fault("it became shorter while it was read")
            done += count

    def _fault(self, reason: str) -> ValueError:
        return ValueError(f"{self.path} is not a whole safetensors file: {reason}")

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._stream.fileno()).st_size
        beginning = memoryview(bytearray(min(size, 8)))
        self._fill(beginning)
        self._digest.update(beginning)
        length = int.from_bytes(beginning, "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            other = describe_content(self.path)
            if other and "safetensors" not in other:
                raise self._fault(f"it is {other}")
            raise self._fault(f"it ends after {size:,} bytes, within its header: copy or download it again")
        header = bytearray(length)
        self._fill(memoryview(header))
        self._digest.update(header)
        try:
            raw = json.loads(header.decode(), object_pairs_hook=unique_keys, parse_constant=_no_constant)
            entries = {key: _parse(value) for key, value in raw.items() if key != "__metadata__"}
            _check_metadata(raw.get("__metadata__"))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise self._fault(f"its header is damaged ({shown(error)})") from error
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        place = 0
        for key, entry in entries.items():
            if entry.begin != place:
                raise self._fault(f"{shown(key)} begins at byte {entry.begin:,} of the tensors instead of {place:,}")
            place = entry.end
        if place != size - 8 - length:
            raise self._fault(
                f"its tensors have {size - 8 - length:,} bytes instead of {place:,}: copy or download it again"
            )
        return entries


def _no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads, and which are not JSON."""
    raise ValueError(f"it has {name}, which is not JSON")


def _check_metadata(found: Any) -> None:
    """Raise ValueError if the header's metadata are not texts by name, as the library needs them."""
    if found is not None and not (isinstance(found, dict) and all(isinstance(text, str) for text in found.values())):
        raise ValueError("its __metadata__ are not texts by name")


def _parse(value: Any) -> Entry:
    """An entry of the header.

    Raises:
        ValueError, TypeError, LookupError: it is damaged.
    """
    begin, end = value["data_offsets"]
    entry = Entry(str(value["dtype"]), tuple(value["shape"]), begin, end)
    if any(type(number) is not int or number < 0 for number in (*entry.shape, begin, end)):
        raise ValueError(f"{shown(value)} has a number that is no size")
    if max(entry.shape, default=0) >= 2**63 or math.prod(size for size in entry.shape if size) >= 2**63:
        raise ValueError(f"{shown(value)} has a shape that no tensor can have")
    wanted = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
    if end < begin or (entry.dtype in _BYTES and end - begin != wanted):
        raise ValueError(f"{shown(value)} has {end - begin} bytes, {wanted} are needed")
    return entry


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file and read its header.

    Raises:
        ValueError: it is not a whole safetensors file; the message says what it is instead.
    """
    with path.open("rb", buffering=0) as stream:
        yield TensorFile(path, stream)  # type: ignore[arg-type]
