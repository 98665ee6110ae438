"""Outputs of the trunk, computed once per document and kept where there is room.

The trunk is frozen and documents do not see each other, so the trunk's output for a document depends on that document
alone: any epoch, order, packing and learning rate can use it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.available import available_memory
from model.data.packing import Pack, pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.flops import necessary_flops
from model.engine.ranks import ALONE, Ranks
from model.engine.trunk_file import TrunkFile, open_trunk_file
from model.files import sha256_file, sha256_json
from model.net.device import pin, uses_tf32

if TYPE_CHECKING:
    from model.engine.trunk_sharing import SharedTrunks

_CODE_VERSION = 3  # increase it when the same inputs give other outputs
_IN_WORDS = {"device": "on the device", "host": "in memory", "file": "in a file"}
_READ_BYTES = 1e9  # bytes per second: assumed lower bound for reading a file
_TRUNK_FLOPS = {"cuda": 4e14, "cpu": 2e12}  # per second: assumed upper bound for computing the trunk


@dataclass(frozen=True)
class TrunkCacheConfig:
    """Where outputs may be kept. It changes results by rounding at most.

    Attributes:
        directory: directory of files that later runs use again; None keeps no files.
        max_bytes: limit for the outputs in memory, and for all files together, in bytes; 0 keeps nothing. Processes
            that train together on one host share it where outputs are kept in main memory.
        shared: outputs of earlier trainings in this process, to use again; None makes new ones.
    """

    directory: Path | None = None
    max_bytes: int = 32 * 10**9
    shared: SharedTrunks | None = None


class TrunkOutputs:
    """Outputs of the trunk for a data set's rows: (N, D) for a pack, from the cache or computed.

    Rows are computed in fixed chunks, whichever of them a pack needs: rounding depends on the shape of a matrix
    product, and a resumed training must repeat the original bit for bit. The exception: the original read a file that
    a training with other chunks had written, and that file was removed since.

    Args:
        engine: runs the trunk.
        dataset: its rows; a row is identified by its number.
        order: all rows, in the order in which they are needed first.
        chunk_tokens: tokens of a chunk, about.
        uses: how often each row will be needed, about.
        config: limits.
        reserved_bytes: bytes of ``config.max_bytes`` that another cache of this process uses.
        ranks: processes that train together; those of one host choose the same place.

    Attributes:
        place: where outputs are kept: "device", "host" (main memory), "file" or "none".
        requested: tokens needed so far.
        computed: tokens computed so far.
    """

    def __init__(
        self,
        engine: Engine,
        dataset: CodeAlpacaDataset,
        order: np.ndarray[Any, Any],
        chunk_tokens: int,
        uses: float,
        config: TrunkCacheConfig,
        reserved_bytes: int = 0,
        ranks: Ranks = ALONE,
    ):
        self.engine = engine
        self.ranks = ranks
        self.dataset = dataset
        self.file: TrunkFile | None = None
        self.values: Tensor | None = None
        self.place = "none"
        self.requested = self.computed = 0
        self.ready = np.zeros(len(dataset), dtype=bool)
        inputs = dataset.lengths[:, 0].astype(np.int64) - 1  # a row's last token is only predicted
        self.starts = dataset.offsets[:-1] - np.arange(len(dataset))  # first input of each row among all inputs
        self.shape = int(inputs.sum()), engine.model.config.n_embd
        self.bytes = self.shape[0] * self.shape[1] * engine.dtype.itemsize
        chunk = np.cumsum(inputs[order]) // chunk_tokens
        self.chunks = np.split(order, np.flatnonzero(np.diff(chunk)) + 1)
        self.chunk_of = np.empty(len(dataset), dtype=np.int64)
        self.chunk_of[order] = np.cumsum(np.diff(chunk, prepend=chunk[:1]) > 0)
        if engine.model.num_frozen > 0 and self.bytes <= config.max_bytes - reserved_bytes:
            self._allocate(uses, config, reserved_bytes)

    def _allocate(self, uses: float, config: TrunkCacheConfig, reserved_bytes: int) -> None:
        """Choose the place: the fastest that has room and is worth it."""
        dtype, device = self.engine.dtype, self.engine.device
        on_gpu = device.type == "cuda"
        if on_gpu and uses <= 1:
            return
        if on_gpu and self.bytes < 0.5 * self.ranks.lowest(torch.cuda.mem_get_info(device)[0], local=True):
            self.place, self.values = "device", torch.empty(self.shape, dtype=dtype, device=device)
            return
        # The other cache may have allocated its part of the available memory already, or not yet.
        host_bytes = self.ranks.local_world * (self.bytes + reserved_bytes)
        available = self.ranks.lowest(available_memory(), local=True)
        fits_host = uses > 1 and host_bytes <= config.max_bytes and host_bytes < 0.5 * available
        # On a GPU no file if memory has room: a first epoch of 1558M that writes a file takes 1.7 times as long;
        # a later training saves less than that.
        if not (on_gpu and fits_host):
            self.file = self._find_file(config)
        if self.file is not None:
            self.place, self.values = "file", self.file.values
        elif fits_host:
            self.place, self.values = "host", torch.empty(self.shape, dtype=dtype)

    def _find_file(self, config: TrunkCacheConfig) -> TrunkFile | None:
        """A file for these outputs, if reading it is faster than computing them and the disk has room."""
        engine = self.engine
        flops = necessary_flops(engine.model.config, engine.model.num_frozen, 0, 0, trunk_tokens=1)
        token_bytes = self.shape[1] * engine.dtype.itemsize
        reads_faster = flops / _TRUNK_FLOPS[engine.device.type] > token_bytes / _READ_BYTES
        if config.directory is None or not reads_faster:
            return None
        file: TrunkFile | None = None
        key = self.ranks.from_first(lambda: _key(engine, self.dataset), local=True)
        directory, layout = config.directory / key, (self.shape, len(self.dataset), engine.dtype)
        if self.ranks.local_rank == 0:
            file = open_trunk_file(directory, config.max_bytes, *layout)
        if self.ranks.agree(file is not None, local=True) and file is None:
            file = TrunkFile(directory, *layout)
        return file

    def hand_on(self, engine: Engine, dataset: CodeAlpacaDataset) -> None:
        """Serve another training from now on: its engine has the same trunk, its data set the same rows."""
        self.engine, self.dataset = engine, dataset
        self.requested = self.computed = 0

    def __call__(self, batch: Pack) -> Tensor:
        """Outputs (N, D) on the device for the tokens of a pack."""
        if self.values is None:
            self.requested += len(batch.ids)
            self.computed += len(batch.ids)
            return self.engine.trunk(batch)
        for chunk in np.unique(self.chunk_of[batch.rows[~self.ready[batch.rows]]]):
            self.fill(self.chunks[chunk])
        self.requested += len(batch.ids)
        if self.place == "device":
            return self.values.index_select(0, batch.slots.to(self.engine.device, non_blocking=True))
        chosen = self.values.index_select(0, batch.slots)
        if self.engine.device.type == "cuda":
            chosen = chosen.pin_memory()
        return chosen.to(self.engine.device, non_blocking=True)

    @property
    def hit_share(self) -> float:
        """Share of the tokens needed so far whose outputs were kept already."""
        return max(0.0, 1 - self.computed / self.requested) if self.requested else 0.0

    @property
    def keeps(self) -> bool:
        """Whether outputs are kept."""
        return self.values is not None

    @property
    def bytes_kept(self) -> int:
        """Bytes that the full cache takes."""
        return 0 if self.values is None else self.bytes

    def describe(self) -> str:
        """Size, place and use so far, as a line for the log."""
        if self.values is None:
            return "frozen blocks' outputs are computed anew in each pass"
        kept = f"{self.bytes / 1e9:.2f} GB, {self.hit_share:.0%} of {self.requested:,} tokens taken from there"
        return f"frozen blocks' outputs kept {_IN_WORDS[self.place]}: {kept}"

    def _slots(self, row: int) -> slice:
        """Position of a row's outputs among those of all rows."""
        return slice(self.starts[row], self.starts[row] + self.dataset.lengths[row, 0] - 1)

    def slots_of(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """Positions of the outputs of rows, in their order, (N,), on the host."""
        lengths = self.dataset.lengths[rows, 0].astype(np.int64) - 1
        begins = np.cumsum(lengths) - lengths
        return pin(np.repeat(self.starts[rows] - begins, lengths) + np.arange(lengths.sum()), self.engine.device)

    def keep(self, slots: Tensor, outputs: Tensor) -> None:
        """Keep outputs (N, D), on the device, at their positions (N,)."""
        assert self.values is not None
        place = self.values.device
        self.values[slots.to(place, non_blocking=True)] = outputs.to(place)

    def fill(self, chunk: np.ndarray[Any, Any]) -> None:
        """Make a chunk's rows ready: read those that the file has, or else compute the whole chunk."""
        assert self.values is not None
        if self.file is not None:
            for row in chunk[~self.ready[chunk]]:
                if self.file.is_valid(row, self._slots(row)):
                    self.ready[row] = True
            if self.ready[chunk].all():
                return
        batch = pack(self.dataset, chunk, self.engine.device)
        self.computed += len(batch.ids)
        outputs, slots = self.engine.trunk(batch), batch.slots
        missing = ~self.ready[batch.rows]
        if not missing.all():  # rare; the selection waits for the GPU
            keep = torch.from_numpy(np.repeat(missing, batch.documents.lengths))
            outputs, slots = outputs[keep.to(outputs.device)], slots[keep]
        self.keep(slots, outputs)
        if self.file is not None:
            for row in batch.rows[missing]:
                self.file.write_checksum(row, self._slots(row))
        self.ready[chunk] = True  # rows without a target too: they are in no pack


def _key(engine: Engine, dataset: CodeAlpacaDataset) -> str:
    """A sha256 over everything that determines the outputs, such as the trunk's weights, and over nothing else."""
    model = engine.model
    return sha256_json(
        {
            "code": _CODE_VERSION,
            "trunk": engine.trunk_sha256,
            "depth": model.num_frozen,
            "heads": model.config.n_head,
            "epsilon": model.config.layer_norm_epsilon,
            "dtype": "tf32" if engine.dtype == torch.float32 and uses_tf32() else str(engine.dtype),
            "device": engine.device.type,
            "ids": sha256_file(dataset.ids_file),
            "lengths": hashlib.sha256(dataset.lengths[:, 0].tobytes()).hexdigest(),
        }
    )
