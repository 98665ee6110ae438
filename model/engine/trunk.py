"""The trunk's outputs, computed once per document and kept where they fit.

The trunk is frozen and documents do not see each other, so that its output for a document depends on that
document alone: any epoch, order, packing and learning rate can use it again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Pack, pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.flops import necessary_flops
from model.files import sha256_file, sha256_json

_CODE_VERSION = 3  # to be raised when the same inputs would give other outputs
_VALUES, _CHECKSUMS = "values.bin", "checksums.bin"
_READ_BYTES = 1e9  # per second: what a file must at least deliver
_TRUNK_FLOPS = {"cuda": 4e14, "cpu": 2e12}  # per second: what the trunk at most computes


@dataclass(frozen=True)
class TrunkCacheConfig:
    """Where outputs may be kept; it changes a result by rounding at most.

    Attributes:
        directory: of files that later runs use again; None for none.
        max_bytes: kept at most, in memory as well as in all files together; 0 keeps nothing.
    """

    directory: Path | None = None
    max_bytes: int = 32 * 10**9


class TrunkOutputs:
    """The trunk's outputs of a data set's rows: (N, D) for a pack, from the cache or computed.

    A row is computed in the company of the same other rows, its group: rounding depends on the shape of a matrix
    product, and a resumed training must repeat the original. It does so to the bit unless a file that it read was
    filled by a training with other groups, and removed since.

    Args:
        engine: with the trunk.
        dataset: rows are known by their number in it.
        order: all rows, in the order they will first be needed in.
        group_tokens: computed at a time.
        uses: how often a row will be needed, about.
        config: limits.
        beside: bytes of ``config.max_bytes`` that another cache of this process takes.
    """

    def __init__(
        self,
        engine: Engine,
        dataset: CodeAlpacaDataset,
        order: np.ndarray[Any, Any],
        group_tokens: int,
        uses: float,
        config: TrunkCacheConfig,
        beside: int = 0,
    ):
        self.engine = engine
        self.dataset = dataset
        self.file: _File | None = None
        self.values: Tensor | None = None
        self.place = "none"
        self.requested = self.computed = 0
        self.ready = np.zeros(len(dataset), dtype=bool)
        width = engine.model.config.n_embd
        inputs = dataset.lengths[:, 0].astype(np.int64) - 1
        self.starts = dataset.offsets[:-1] - np.arange(len(dataset))  # among the inputs of all rows
        self.bytes = int(inputs.sum()) * width * engine.dtype.itemsize
        group = np.cumsum(inputs[order]) // group_tokens
        self.groups = np.split(order, np.flatnonzero(np.diff(group)) + 1)
        self.group_of = np.empty(len(dataset), dtype=np.int64)
        self.group_of[order] = np.cumsum(np.diff(group, prepend=group[:1]) > 0)
        shape = (int(inputs.sum()), width)
        if engine.model.num_frozen == 0 or self.bytes > config.max_bytes - beside:
            return
        on_gpu = engine.device.type == "cuda"
        if on_gpu and uses <= 1:
            return
        if on_gpu and self.bytes < 0.5 * torch.cuda.mem_get_info(engine.device)[0]:
            self.place, self.values = "device", torch.empty(shape, dtype=engine.dtype, device=engine.device)
            return
        # The other cache may have taken its part of what is available, or not yet.
        fits_host = uses > 1 and self.bytes + beside < 0.5 * available_memory()
        # On a GPU no file beside memory: a first epoch of 1558M that writes one takes 1.7 times as long, and a later
        # training spares less than that.
        if not (on_gpu and fits_host):
            self.file = self._find_file(config, shape)
        if self.file is not None:
            self.place, self.values = "file", self.file.values
        elif fits_host:
            self.place, self.values = "host", torch.empty(shape, dtype=engine.dtype)

    def _find_file(self, config: TrunkCacheConfig, shape: tuple[int, int]) -> _File | None:
        """A file of these outputs, if reading it is faster than computing them, and there is room."""
        engine = self.engine
        flops = necessary_flops(engine.model.config, engine.model.num_frozen, 0, 0, trunk_tokens=1)
        reads_faster = flops / _TRUNK_FLOPS[engine.device.type] > shape[1] * engine.dtype.itemsize / _READ_BYTES
        if config.directory is None or not reads_faster:
            return None
        return _open_file(config, _key(engine, self.dataset), shape, len(self.dataset), engine.dtype)

    def __call__(self, batch: Pack) -> Tensor:
        """Outputs (N, D) on the device for the tokens of a pack."""
        if self.values is None:
            self.requested += len(batch.ids)
            self.computed += len(batch.ids)
            return self.engine.trunk(batch)
        for group in np.unique(self.group_of[batch.rows[~self.ready[batch.rows]]]):
            self._fill(self.groups[group])
        self.requested += len(batch.ids)
        if self.place == "device":
            return self.values.index_select(0, batch.slots.to(self.engine.device, non_blocking=True))
        chosen = self.values.index_select(0, batch.slots)
        if self.engine.device.type == "cuda":
            chosen = chosen.pin_memory()
        return chosen.to(self.engine.device, non_blocking=True)

    @property
    def hit_share(self) -> float:
        """Tokens that need not be computed when they were needed, over all tokens needed so far."""
        return max(0.0, 1 - self.computed / self.requested) if self.requested else 0.0

    @property
    def bytes_kept(self) -> int:
        """Bytes that the cache takes when it is full."""
        return 0 if self.values is None else self.bytes

    def describe(self) -> str:
        """Size, place and use so far, for people."""
        if self.values is None:
            return "trunk outputs are computed anew each time"
        kept = f"{self.bytes / 1e9:.2f} GB on the {self.place}"
        return f"trunk outputs: {kept}, {self.hit_share:.0%} of {self.requested:,} tokens from there"

    def _part(self, row: int) -> slice:
        """Where a row's outputs lie."""
        return slice(self.starts[row], self.starts[row] + self.dataset.lengths[row, 0] - 1)

    def _fill(self, group: np.ndarray[Any, Any]) -> None:
        """Make a group's rows ready, from the file where it has them."""
        assert self.values is not None
        if self.file is not None:
            for row in group[~self.ready[group]]:
                if self.file.holds(row, self._part(row)):
                    self.ready[row] = True
            if self.ready[group].all():
                return
        batch = pack(self.dataset, group, self.engine.device)
        self.computed += len(batch.ids)
        outputs, slots = self.engine.trunk(batch), batch.slots
        missing = ~self.ready[batch.rows]
        if not missing.all():  # rarely so: choosing would wait for the GPU
            keep = torch.from_numpy(np.repeat(missing, batch.documents.lengths))
            outputs, slots = outputs[keep.to(outputs.device)], slots[keep]
        place = self.values.device
        self.values[slots.to(place, non_blocking=True)] = outputs.to(place)
        if self.file is not None:
            for row in batch.rows[missing]:
                self.file.seal(row, self._part(row))
        self.ready[group] = True  # rows without a target among them: nobody asks for those


class _File:
    """Outputs in a memory-mapped file, a checksum for each row beside it: what was cut short is found out.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, directory: Path, shape: tuple[int, int], rows: int, dtype: torch.dtype):
        directory.mkdir(parents=True, exist_ok=True)
        size = shape[0] * shape[1]
        for name, length in ((_VALUES, size * dtype.itemsize), (_CHECKSUMS, 4 * rows)):
            with (directory / name).open("ab") as stream:
                if stream.tell() != length:
                    stream.truncate(length)
                # Room now: to write to a map of a file that finds none later is the end of the process (SIGBUS).
                if length and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, length)
        os.utime(directory)  # used now
        self.values = torch.from_file(str(directory / _VALUES), shared=True, size=size, dtype=dtype).view(shape)
        self.checksums = np.memmap(directory / _CHECKSUMS, dtype="<u4", mode="r+")

    def holds(self, row: int, part: slice) -> bool:
        return self.checksums[row] != 0 and self.checksums[row] == self._checksum(part)

    def seal(self, row: int, part: slice) -> None:
        self.checksums[row] = self._checksum(part)

    def _checksum(self, part: slice) -> int:
        return zlib.crc32(self.values[part].view(torch.uint8).numpy().data) or 1


def _key(engine: Engine, dataset: CodeAlpacaDataset) -> str:
    """A sha256 over all that determines the outputs, the weights of the trunk among it, and of nothing else."""
    model = engine.model
    return sha256_json(
        {
            "code": _CODE_VERSION,
            "trunk": engine.trunk_sha256,
            "depth": model.num_frozen,
            "heads": model.config.n_head,
            "epsilon": model.config.layer_norm_epsilon,
            "dtype": str(engine.dtype),
            "device": engine.device.type,
            "ids": sha256_file(dataset.ids_file),
            "lengths": hashlib.sha256(dataset.lengths[:, 0].tobytes()).hexdigest(),
        }
    )


def _open_file(
    config: TrunkCacheConfig, key: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> _File | None:
    """The file of this key; files used longest ago make room for it. None if the disk has no room."""
    assert config.directory is not None
    size = shape[0] * shape[1] * dtype.itemsize
    directory = config.directory / key
    config.directory.mkdir(parents=True, exist_ok=True)
    used: dict[Path, float] = {}
    sizes: dict[Path, int] = {}
    for path in config.directory.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError):  # another run makes room too
            if path != directory:
                used[path], sizes[path] = path.stat().st_mtime, (path / _VALUES).stat().st_size
    total = sum(sizes.values())
    for path in sorted(sizes, key=lambda path: used[path]):
        if total + size <= config.max_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)  # whoever has it mapped keeps it until then
        total -= sizes[path]
    known = directory.exists()
    if not known and size > 0.5 * shutil.disk_usage(config.directory).free:
        return None
    try:
        return _File(directory, shape, rows, dtype)
    except OSError:
        if not known:
            shutil.rmtree(directory, ignore_errors=True)
        return None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can be had now, by the system's account and by that of a container with a limit.

    Args:
        root: above ``proc`` and ``sys``.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # free pages leave out what files are cached in
        available = _field(root / "proc" / "meminfo", "MemAvailable:") * 1024
    groups = root / "sys" / "fs" / "cgroup"
    for group, limit, used in (  # cgroup v2 and v1
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            room = int((group / limit).read_text()) - int((group / used).read_text())
            available = min(available, room + _field(group / "memory.stat", "inactive_file"))
    return max(0, available)


def _field(file: Path, name: str) -> int:
    """The number behind a name in a file of the kernel's.

    Raises:
        OSError: there is no such file or name.
    """
    for words in map(str.split, file.read_text().splitlines()):
        if words[0] == name:
            return int(words[1])
    raise OSError(f"{file} has no line {name}")
