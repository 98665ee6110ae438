"""Outputs of the trunk that the ranks of one host compute together, before they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from model.data.packing import pack
from model.engine.trunk import TrunkOutputs


def fill_together(outputs: TrunkOutputs, rows: np.ndarray[Any, Any]) -> None:
    """Compute the outputs of rows once per host, if they are kept at all, and make them ready on all its ranks.

    The chunks are those of a training on one device, so that outputs have the same bits. They are dealt to the ranks
    of a host. Nothing is sent between hosts: receiving a chunk over a network takes as long as computing it.

    Args:
        outputs: of the same rows, in the same place, on all ranks of the host.
        rows: rows that will be needed.
    """
    if not outputs.keeps or outputs.ranks.world == 1:
        return
    needed = np.unique(outputs.chunk_of[rows[~outputs.ready[rows]]])
    chunks = [outputs.chunks[number] for number in needed]
    world = outputs.ranks.local_world
    if outputs.place == "file":  # shared by the ranks of the host
        for chunk in chunks[outputs.ranks.local_rank :: world]:
            outputs.fill(chunk)
        outputs.ranks.barrier(local=True)
    else:
        for first in range(0, len(chunks), world):
            _exchange(outputs, chunks[first : first + world])
    for chunk in chunks:
        outputs.ready[chunk] = True


def _exchange(outputs: TrunkOutputs, chunks: list[np.ndarray[Any, Any]]) -> None:
    """Compute one chunk per rank, and keep all of them on every rank."""
    assert outputs.values is not None
    ranks, engine, dataset = outputs.ranks, outputs.engine, outputs.dataset
    slots = [outputs.slots_of(dataset.with_targets(chunk)) for chunk in chunks]
    longest = max(map(len, slots))
    mine = outputs.values.new_zeros(longest, outputs.shape[1], device=engine.device)
    if ranks.local_rank < len(chunks):
        batch = pack(dataset, chunks[ranks.local_rank], engine.device)
        mine[: len(batch.ids)] = engine.trunk(batch)
        outputs.computed += len(batch.ids)
    for index, values in zip(slots, ranks.gather_on_host(mine), strict=False):
        outputs.keep(index, values[: len(index)])
