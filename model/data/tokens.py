"""Token files of a data set, read as examples for training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.files import parse_json, read_bytes, sha256_file, sha256_json, write_json

IGNORE = -100  # label of positions that bear no loss; padding is marked by length, never by its id
META_FILE = "meta.json"


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, with the sha256 of its own content under ``sha256``."""
    write_json(directory / META_FILE, {**meta, "sha256": sha256_json(meta)})


def read_meta(directory: Path) -> dict[str, Any]:
    """What ``write_meta`` wrote.

    Raises:
        OSError: there is none.
        ValueError: it is damaged; the message names it.
    """
    path = directory / META_FILE
    meta = parse_json(read_bytes(path), path)
    if not isinstance(meta, dict) or meta.pop("sha256", None) != sha256_json(meta):
        raise ValueError(f"{path} is damaged: its content does not have the sha256 in it")
    return meta


def verify_tokens(directory: Path) -> dict[str, Any] | None:
    """The content of the meta.json of a complete, undamaged token directory, else None."""
    try:
        meta = read_meta(directory)
        intact = all(sha256_file(directory / name) == sha256 for name, sha256 in meta["files"].items())
    except (OSError, ValueError):
        return None
    return meta if intact else None


class CodeAlpacaDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A split's examples, memory-mapped.

    Args:
        directory: written by ``prepare``.
        split: train, validation or test.
        limit: use the first rows only.
        prompt_loss_weight: weight of the loss on prompt tokens; response tokens have weight 1.

    Attributes, for n rows:
        lengths: (n, 2), tokens of each row and of its prompt.
        offsets: (n + 1,), index in ``ids`` of each row's first token, and the end of the last row.
        ids: (tokens,), the ids of all rows of the split, memory-mapped from ``ids_file``.
        longest: tokens of the longest row.
        rows: text of the rows, for held-out splits; empty for train.
    """

    def __init__(self, directory: Path, split: str, limit: int | None = None, prompt_loss_weight: float = 0.0):
        meta = read_meta(directory)
        self.lengths = np.load(directory / f"{split}.lengths.npy")[:limit]  # (rows, 2)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths[:, 0], dtype=np.int64)])
        self.ids_file = directory / f"{split}.ids.bin"
        self.ids = np.memmap(self.ids_file, dtype=np.dtype(meta["dtype"]), mode="r")
        self.prompt_loss_weight = prompt_loss_weight
        self.longest = int(self.lengths[:, 0].max(initial=1))
        text = directory / f"{split}.rows.jsonl"
        self.rows: list[dict[str, Any]] = []
        if text.exists():
            with text.open() as stream:
                self.rows = [json.loads(line) for line, _ in zip(stream, self.lengths, strict=False)]

    def __len__(self) -> int:
        return len(self.lengths)

    def loss_weight(self, rows: np.ndarray[Any, Any]) -> float:
        """Sum of the loss weights of rows, the divisor of their summed loss. The first token is never a target."""
        lengths, prompts = self.lengths[rows, 0], np.maximum(1, self.lengths[rows, 1])
        return float((lengths - prompts).sum() + self.prompt_loss_weight * (prompts - 1).sum())

    def target_counts(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Number of tokens of each row that bear loss, (rows,), int64."""
        lengths, prompts = self.lengths[rows].astype(np.int64).T
        everywhere = self.prompt_loss_weight != 0
        return np.maximum(0, lengths - (1 if everywhere else np.maximum(1, prompts)))

    def with_targets(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Those of the rows, in their order, that have a token that bears loss; the others are in no pack."""
        return rows[self.target_counts(rows) > 0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids (T,), labels (T,) with IGNORE where the loss weight is 0, loss_weights (T,)."""
        length, prompt_length = (int(n) for n in self.lengths[index])
        start = self.offsets[index]
        ids = torch.from_numpy(self.ids[start : start + length].astype(np.int64))
        weights = torch.ones(length)
        weights[:prompt_length] = self.prompt_loss_weight
        labels = ids.masked_fill(weights == 0, IGNORE)
        return {"input_ids": ids, "labels": labels, "loss_weights": weights}


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """The order in which an epoch visits the rows; a function of seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
