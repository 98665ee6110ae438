"""Outputs of the trunk, and an engine, that the trainings of one process hand on to one another."""

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
    """Outputs in memory that several trainings of one model use in turn, in one process, and their engine.

    A training is handed the outputs of an earlier one if they have the bits that it would have computed itself: those
    of the same trunk, rows, chunks and dtype. Otherwise the earlier ones are dropped. Likewise it is handed the
    engine, which has captured CUDA graphs, if it would capture the same ones.
    """

    def __init__(self) -> None:
        self._engine: tuple[tuple[Any, ...], Engine] | None = None
        self._kept: dict[Path, tuple[tuple[Any, ...], TrunkOutputs]] = {}

    def take(self, key: tuple[Any, ...], dataset: CodeAlpacaDataset) -> TrunkOutputs | None:
        """The outputs for a data set's rows, if they were made for the same key."""
        kept = self._kept.get(dataset.ids_file)
        if kept is not None and kept[0] == key:
            return kept[1]
        if kept is not None:
            self._kept.clear()
        return None

    def keep(self, key: tuple[Any, ...], outputs: TrunkOutputs) -> None:
        """Keep outputs for the trainings that follow."""
        self._kept[outputs.dataset.ids_file] = key, outputs

    def engine(self, fresh: Engine, seed: int, passes: tuple[int, ...]) -> Engine:
        """The engine of the training before, restarted, if its graphs fit; else ``fresh``, for those that follow.

        Args:
            fresh: an engine for the training.
            seed: of ``fresh``.
            passes: numbers that decide how many tokens a pass has. Trainings with other passes would add graphs of
                other sizes to those that take memory already.
        """
        model = fresh.model
        # Dropout's rate, TF32 and dtype are constants of a captured graph.
        key = model, model.num_frozen, model.config.dropout, fresh.dtype, uses_tf32(), fresh.graph_steps, passes
        if self._engine is not None and self._engine[0] == key:
            self._engine[1].restart(seed)
        else:
            self._engine = key, fresh
        return self._engine[1]

    def clear(self) -> None:
        """Drop all outputs and the engine, and free their memory."""
        self._kept.clear()
        self._engine = None


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
