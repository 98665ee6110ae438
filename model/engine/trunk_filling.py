"""Outputs of the trunk that the ranks of one host compute together, before they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from model.data.packing import pack
from model.engine.trunk import TrunkOutputs


def fill_together(
    outputs: TrunkOutputs, rows: np.ndarray[Any, Any], before_each: Callable[[], None] = lambda: None
) -> None:
    """Compute the outputs of rows once per host, if they are kept at all, and make them ready on all its ranks.

    The chunks are those of a training on one device, so that outputs have the same bits. They are dealt to the ranks
    of a host. Nothing is sent between hosts: receiving a chunk over a network takes as long as computing it.

    Args:
        outputs: of the same rows, in the same place, on all ranks of the host.
        rows: rows that will be needed.
        before_each: called before each chunk, equally often on all ranks of all hosts; what it raises ends the
            filling, and rows that are not complete are computed when they are needed.
    """
    ranks = outputs.ranks
    if ranks.world == 1:
        return
    missing = rows[~outputs.ready[rows]] if outputs.keeps else rows[:0]
    chunks = [outputs.chunks[number] for number in np.unique(outputs.chunk_of[missing])]
    is_shared = outputs.place == "file"  # by the ranks of the host
    for number in range(ranks.highest(math.ceil(len(chunks) / ranks.local_world))):
        before_each()
        part = chunks[number * ranks.local_world : (number + 1) * ranks.local_world]
        if part and not is_shared:
            _exchange(outputs, part)
        elif ranks.local_rank < len(part):
            outputs.fill(part[ranks.local_rank])
    if is_shared:
        ranks.barrier(local=True)
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
