"""From rows to token files, and from token files to examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from model.data.rows import (
    IN_HELD_OUT,
    PROMPT_TOO_LONG,
    SPLITS,
    UNUSABLE,
    UnusableRow,
    fraction,
    normalize_row,
    prompt_key,
    read_records,
    row_key,
)
from model.files import atomic_directory, sha256_file, write_json
from model.net.prompt import encode_examples, encode_prompts, format_prompt
from model.parameters import Count, Seeded, Share, WholeNumber, internal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of positions that bear no loss; padding is marked by length, never by its id
META_FILE = "meta.json"
_CHUNK = 1000  # rows tokenised at a time


@dataclass(frozen=True)
class PrepareConfig(Seeded):
    """How rows become tokens."""

    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens a row is cut at, prompt included."""
    subset_start: WholeNumber = 0
    """First row of train to use, counted from 0."""
    subset_count: Count | None = None
    """Rows of train to use from there; null uses all. With subset=next: fresh rows to use at most."""
    subset_keys: str | None = internal(None)
    """A .npy file with the content keys (uint64) of the rows of train to use instead."""
    test_share: Share = 0.1
    """Share of train that becomes test where the data set has no test split."""
    validation_share: Share = 0.02
    """Share of train that becomes validation where the data set has no validation split."""
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """A larger share of unusable rows is an error."""


@dataclass
class Counts:
    """What became of the rows."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    target_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    seen: int = 0


class _SplitWriter:
    """Appends a split's rows: ids flat in a binary file, lengths beside it, text for held-out splits."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any]):
        self.path = directory / split
        self.dtype = dtype
        self.ids: IO[bytes] = self.path.with_suffix(".ids.bin").open("wb")
        self.text: IO[str] | None = None if split == "train" else self.path.with_suffix(".rows.jsonl").open("w")
        self.lengths: list[tuple[int, int]] = []
        self.pending: list[dict[str, Any]] = []

    def close(self) -> None:
        self.ids.close()
        if self.text:
            self.text.close()
        np.save(self.path.with_suffix(".lengths.npy"), np.array(self.lengths, dtype=np.int32).reshape(-1, 2))


def prepare(
    sources: Mapping[str, Sequence[Path]],
    tokenizer: PreTrainedTokenizerBase,
    config: PrepareConfig,
    target: Path,
) -> dict[str, Any]:
    """Format, split and tokenise; rows stream through, so memory does not grow with their number.

    Test is the source's own, else a share of train; validation likewise. Both are taken from all of train,
    whatever the subset, so that runs on different subsets are scored on the same rows. A training row
    whose normalised prompt stands in either is dropped. A row longer than ``max_length`` is cut and then
    has no EOS; one whose whole response would be cut is dropped.

    Args:
        sources: split -> files, as from ``find_splits``.
        target: the directory to write: per split ``.ids.bin`` (uint16 or uint32, flat), ``.lengths.npy``
            (rows x (length, prompt length)), ``.rows.jsonl`` (text; held-out splits), and ``meta.json``.

    Returns:
        The contents of meta.json: configuration, counts, sha256 over all rows used and of each file.

    Raises:
        ValueError: too many unusable rows (the message has the first five row numbers), or a split is empty.
    """
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    counts = Counts()
    digest = hashlib.sha256()
    first_bad: list[str] = []
    held_out: set[bytes] = set()
    wanted = _subset(config)
    with atomic_directory(target) as scratch:
        writers = {split: _SplitWriter(scratch, split, dtype) for split in SPLITS}

        def drop(reason: str) -> None:
            counts.dropped[reason] = counts.dropped.get(reason, 0) + 1

        def flush(split: str) -> None:
            writer = writers[split]
            examples = encode_examples(
                tokenizer, [r["prompt"] for r in writer.pending], [r["completion"] for r in writer.pending]
            )
            for row, (ids, prompt_length) in zip(writer.pending, examples, strict=True):
                if prompt_length >= config.max_length:
                    drop(PROMPT_TOO_LONG)
                    continue
                counts.truncated += len(ids) > config.max_length
                ids = ids[: config.max_length]
                writer.ids.write(np.array(ids, dtype=dtype).tobytes())
                writer.lengths.append((len(ids), prompt_length))
                if writer.text:
                    writer.text.write(json.dumps(row) + "\n")
                digest.update(json.dumps([split, {**row, "row": None}]).encode() + b"\n")
                counts.rows[split] += 1
                counts.tokens[split] += len(ids)
                counts.target_tokens[split] += len(ids) - prompt_length
            writer.pending.clear()

        # Held-out files first: training rows are compared with their prompts.
        for source_split in ("test", "validation", "train"):
            for record in _route(source_split, sources, config, held_out):
                in_subset = source_split != "train" or wanted(record)
                counts.seen += in_subset
                if record.reason:
                    if in_subset:
                        drop(record.reason)
                        record.note(first_bad)
                    continue
                if record.split == "train" and not in_subset:
                    continue
                writers[record.split].pending.append({"row": record.number, **record.row})
                if len(writers[record.split].pending) >= _CHUNK:
                    flush(record.split)
            # A validation file that repeats test's prompts must not be read before test is complete.
            for split in SPLITS:
                flush(split)
        for writer in writers.values():
            writer.close()
        _check_counts(counts, first_bad, config, sources)
        meta = {
            "config": asdict(config),
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "dtype": dtype.str,
            "counts": asdict(counts),
            "data_sha256": digest.hexdigest(),
            "files": {path.name: sha256_file(path) for path in sorted(scratch.iterdir())},
        }
        write_json(scratch / META_FILE, meta)
    return meta


def training_keys(
    sources: Mapping[str, Sequence[Path]], tokenizer: PreTrainedTokenizerBase, config: PrepareConfig
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The content keys of all rows that ``prepare`` would train on, and of those that it would hold out.

    Args:
        config: its subset plays no part.

    Returns:
        Two arrays of uint64, each key once, in the order of the source.

    Raises:
        ValueError: too many unusable rows.
    """
    held_out: set[bytes] = set()
    keys: dict[str, dict[int, None]] = {"train": {}, "held out": {}}
    first_bad: list[str] = []
    seen = unusable = 0
    for source_split in ("test", "validation", "train"):
        for record in _route(source_split, sources, config, held_out):
            seen += 1
            unusable += record.reason in UNUSABLE
            record.note(first_bad)
            if record.reason:
                continue
            if record.split == "train" and _too_long(record.row["prompt"], tokenizer, config.max_length):
                continue
            keys["train" if record.split == "train" else "held out"][row_key(record.row)] = None
    _check_unusable(unusable, seen, first_bad, config, sources)
    train, rest = (np.fromiter(found, dtype=np.uint64, count=len(found)) for found in keys.values())
    return train, rest


def _too_long(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    """Whether nothing of the response would be left; tokens have a byte at least, so that most need no encoding."""
    if len(format_prompt({"prompt": prompt}).encode()) < max_length:
        return False
    return len(encode_prompts(tokenizer, [prompt])[0]) >= max_length


@dataclass(frozen=True)
class _Routed:
    """A record on its way: where it stood, the split it belongs to, or the reason why it is dropped.

    Attributes:
        number: in the source split, counted over its files from 0.
        in_file: in its file, from 0.
    """

    number: int
    in_file: int
    path: Path
    split: str
    row: dict[str, Any]
    reason: str | None = None

    def note(self, first_bad: list[str]) -> None:
        """Add the record to the first five that cannot be used, if it is one."""
        if self.reason in UNUSABLE and len(first_bad) < 5:
            first_bad.append(f"{self.path.name} row {self.in_file} ({self.reason})")


def _route(
    source_split: str, sources: Mapping[str, Sequence[Path]], config: PrepareConfig, held_out: set[bytes]
) -> Iterator[_Routed]:
    """The records of a source split in order, each with the split it belongs to.

    Args:
        held_out: prompts of held-out files so far; those of this split are added.
    """
    for number, (in_file, path, record) in enumerate(_records(sources.get(source_split, []))):
        try:
            row = normalize_row(record)
        except UnusableRow as error:
            yield _Routed(number, in_file, path, source_split, {}, error.reason)
            continue
        key = prompt_key(row["prompt"])
        split = source_split
        if split != "test" and key in held_out:
            yield _Routed(number, in_file, path, split, row, IN_HELD_OUT)
            continue
        if split != "train":
            held_out.add(key)
        elif "test" not in sources and fraction(key, config.seed, "test") < config.test_share:
            split = "test"
        elif "validation" not in sources and fraction(key, config.seed, "validation") < config.validation_share:
            split = "validation"
        yield _Routed(number, in_file, path, split, row)


def _records(paths: Sequence[Path]) -> Iterator[tuple[int, Path, Any]]:
    """Records with their position in their file, from 0."""
    for path in paths:
        for in_file, record in enumerate(read_records(path)):
            yield in_file, path, record


def _subset(config: PrepareConfig) -> Callable[[_Routed], bool]:
    """Whether a record of train is among those to use: by content where keys are given, else by position."""
    if config.subset_keys is not None:
        keys = frozenset(np.load(config.subset_keys, allow_pickle=False).tolist())
        return lambda record: bool(record.row) and row_key(record.row) in keys
    start, count = config.subset_start, config.subset_count
    return lambda record: record.number >= start and (count is None or record.number < start + count)


def _names(sources: Mapping[str, Any]) -> str:
    return ", ".join(str(path) for paths in sources.values() for path in paths)


def _check_unusable(
    unusable: int, seen: int, first_bad: list[str], config: PrepareConfig, sources: Mapping[str, Any]
) -> None:
    if seen and unusable / seen > config.max_dropped_share:
        raise ValueError(
            f"{unusable} of {seen} rows of {_names(sources)} cannot be used, more than max_dropped_share "
            f"{config.max_dropped_share:g} allows; the first, counted from 0: {'; '.join(first_bad)}. Rows have "
            "prompt and completion, or instruction and output"
        )


def _check_counts(counts: Counts, first_bad: list[str], config: PrepareConfig, sources: Mapping[str, Any]) -> None:
    _check_unusable(
        sum(counts.dropped.get(reason, 0) for reason in UNUSABLE), counts.seen, first_bad, config, sources
    )
    names = _names(sources)
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.dropped.items())) or "none dropped"
    if not counts.rows["train"]:
        raise ValueError(
            f"no training row is left of {names} (subset_start {config.subset_start}, subset_count "
            f"{config.subset_count}, max_length {config.max_length}; {dropped})"
        )
    for split, setting in (("validation", "validation_share"), ("test", "test_share")):
        if not counts.rows[split]:
            enough = min(0.5, 5 / counts.seen)  # five are expected then, and 0.7 % of all draws give none
            raise ValueError(
                f"the {split} split of {names} is empty: raise {setting}, {enough:.2g} will do, or add rows "
                f"({dropped})"
            )


def verify_tokens(directory: Path) -> dict[str, Any] | None:
    """The meta.json of a complete, undamaged token directory, else None."""
    try:
        meta = json.loads((directory / META_FILE).read_text())
        intact = all(sha256_file(directory / name) == sha256 for name, sha256 in meta["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return meta if intact else None


class CodeAlpacaDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A split's examples, memory-mapped.

    Args:
        directory: written by ``prepare``.
        split: train, validation or test.
        limit: use the first rows only.
        prompt_loss_weight: weight of the loss on prompt tokens; on response tokens it is 1.
    """

    def __init__(self, directory: Path, split: str, limit: int | None = None, prompt_loss_weight: float = 0.0):
        meta = json.loads((directory / META_FILE).read_text())
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
        """Sum of the loss weights of rows: what their summed loss is divided by. The first token is no target."""
        lengths, prompts = self.lengths[rows, 0], np.maximum(1, self.lengths[rows, 1])
        return float((lengths - prompts).sum() + self.prompt_loss_weight * (prompts - 1).sum())

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """input_ids (T,), labels (T,) with IGNORE where no loss is, loss_weights (T,)."""
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
