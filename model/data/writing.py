"""Token files written row by row, with counts and a digest of the rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from model.data.layout import SPLITS
from model.data.schemas import PROMPT_TOO_LONG
from model.net.prompt import encode_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # rows tokenised at a time


@dataclass
class Counts:
    """Row counts of a preparation, as stored in meta.json.

    Attributes:
        rows: rows written, by split.
        tokens: tokens written, by split.
        target_tokens: response tokens written, by split.
        dropped: rows dropped, by reason.
        truncated: rows cut at max_length.
        seen: rows read; of train, those of the subset only.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    target_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    seen: int = 0

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class TokenFiles:
    """The token files of all splits while they are written: queues rows, tokenises them in chunks, counts and hashes.

    Args:
        directory: where the files are written.
        max_length: tokens a row is cut at, prompt included.
        counts: changed in place, as rows are written or dropped.

    Attributes:
        dtype: of the ids: uint16 where the vocabulary permits, else uint32.
        digest: sha256 over all rows written, with their splits.
    """

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counts):
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        self.digest = hashlib.sha256()
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._counts = counts
        self._queues: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._writers = {split: _SplitWriter(directory, split, self.dtype) for split in SPLITS}

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Queue a row; a full chunk is written at once."""
        self._queues[split].append(row)
        if len(self._queues[split]) >= _CHUNK:
            self._write_queue(split)

    def flush(self) -> None:
        """Write all queued rows."""
        for split in SPLITS:
            self._write_queue(split)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _write_queue(self, split: str) -> None:
        """Tokenise and write a split's queued rows; rows whose prompt fills max_length are dropped."""
        rows = self._queues[split]
        examples = encode_examples(
            self._tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows]
        )
        for row, (ids, prompt_length) in zip(rows, examples, strict=True):
            if prompt_length >= self._max_length:
                self._counts.drop(PROMPT_TOO_LONG)
            else:
                self._counts.truncated += len(ids) > self._max_length
                self._write(split, row, ids[: self._max_length], prompt_length)
        rows.clear()

    def _write(self, split: str, row: dict[str, Any], ids: list[int], prompt_length: int) -> None:
        self._writers[split].write(row, ids, prompt_length)
        self.digest.update(json.dumps([split, {**row, "row": None}]).encode() + b"\n")
        self._counts.rows[split] += 1
        self._counts.tokens[split] += len(ids)
        self._counts.target_tokens[split] += len(ids) - prompt_length


class _SplitWriter:
    """Appends a split's rows: ids flat in a binary file, lengths beside it, text for held-out splits."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any]):
        self._path = directory / split
        self._dtype = dtype
        self._ids: IO[bytes] = self._path.with_suffix(".ids.bin").open("wb")
        self._text: IO[str] | None = None if split == "train" else self._path.with_suffix(".rows.jsonl").open("w")
        self._lengths: list[tuple[int, int]] = []

    def write(self, row: dict[str, Any], ids: list[int], prompt_length: int) -> None:
        self._ids.write(np.array(ids, dtype=self._dtype).tobytes())
        self._lengths.append((len(ids), prompt_length))
        if self._text:
            self._text.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._ids.close()
        if self._text:
            self._text.close()
        np.save(self._path.with_suffix(".lengths.npy"), np.array(self._lengths, dtype=np.int32).reshape(-1, 2))
