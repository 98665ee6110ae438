"""Outputs of the trunk that the trainings of one process hand on to one another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.ranks import ALONE, Ranks
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.net.device import uses_tf32


class SharedTrunks:
    """Outputs in memory that several trainings of one model use in turn, in one process.

    A training is handed the outputs of an earlier one if they have the bits that it would have computed itself: those
    of the same trunk, rows, chunks and dtype. Otherwise the earlier ones are dropped.
    """

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[Any, ...], TrunkOutputs]] = {}

    def take(self, key: tuple[Any, ...], dataset: CodeAlpacaDataset) -> TrunkOutputs | None:
        """The outputs for a data set's rows, if they were made for the same key."""
        kept = self._kept.get(dataset.ids_file)
        if kept is not None and kept[0] == key:
            return kept[1]
        if kept is not None:
            self.clear()
        return None

    def keep(self, key: tuple[Any, ...], outputs: TrunkOutputs) -> None:
        """Keep outputs for the trainings that follow."""
        self._kept[outputs.dataset.ids_file] = key, outputs

    def clear(self) -> None:
        """Drop all outputs, and free their memory."""
        self._kept.clear()


def trunk_outputs(
    engine: Engine,
    dataset: CodeAlpacaDataset,
    order: np.ndarray[Any, Any],
    chunk_tokens: int,
    uses: float,
    config: TrunkCacheConfig,
    reserved_bytes: int = 0,
    ranks: Ranks = ALONE,
) -> TrunkOutputs:
    """``TrunkOutputs`` with these arguments, or those of an earlier training if ``config.shared`` has them."""
    make = partial(TrunkOutputs, engine, dataset, order, chunk_tokens, uses, config, reserved_bytes, ranks)
    if config.shared is None:
        return make()
    key = (
        engine.model,
        engine.model.num_frozen,
        engine.dtype,
        uses_tf32(),
        len(dataset),
        dataset.prompt_loss_weight != 0,  # decides which rows are packed
        order.tobytes(),
        chunk_tokens,
        uses > 1,  # decides whether outputs are kept at all
        reserved_bytes,
    )
    outputs = config.shared.take(key, dataset)
    if outputs is None:
        outputs = make()
        config.shared.keep(key, outputs)
    outputs.hand_on(engine, dataset)
    return outputs
