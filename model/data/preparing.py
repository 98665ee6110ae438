"""Rows of a data set assigned to splits, tokenised and written as token files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.data.config import PrepareConfig
from model.data.formats import describe_schemas, read_records
from model.data.rows import fraction, prompt_key, row_key
from model.data.schemas import IN_HELD_OUT, UNUSABLE, UnusableRow, normalize_row
from model.data.tokens import write_meta
from model.data.writing import Counts, TokenFiles
from model.files import atomic_directory, sha256_file
from model.net.prompt import encode_prompts, format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = Mapping[str, Sequence[Path]]  # split -> its files, as find_splits returns them

FEWEST_ROWS = 30  # with fewer rows an interval over them is too narrow, and a loss is mostly chance
_ENOUGH = 45  # rows to expect of a share, so that fewer than 30 are drawn in one of a hundred draws

# Held-out files come first: the prompts of training rows are compared with theirs.
_READING_ORDER = ("test", "validation", "train")


def prepare(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    config: PrepareConfig,
    target: Path,
    check_sources: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Format, split and tokenise; rows stream through, so memory does not grow with their number.

    Test is the source's own, else a share of train; validation likewise. Both are taken from all of train,
    whatever the subset, so that runs on different subsets are scored on the same rows. A training row
    whose normalised prompt is also in test or validation is dropped. A row longer than ``max_length`` is cut
    and then has no EOS; a row whose whole response would be cut is dropped.

    Args:
        sources: split -> files, as from ``find_splits``.
        target: the directory to write: per split ``.ids.bin`` (uint16 or uint32, flat), ``.lengths.npy``
            (rows x (length, prompt length)), ``.rows.jsonl`` (text; held-out splits), and ``meta.json``.
        check_sources: called when all rows have been read; if it raises, nothing is written.

    Returns:
        The contents of meta.json: configuration, counts, rows read of each source file, sha256 over all rows used and
        of each file written.

    Raises:
        ValueError: too many unusable rows (the message names the first five), or a split is empty.
    """
    inspection = _Inspection(sources, config)
    in_subset = _subset_test(config)
    held_out: set[bytes] = set()
    with atomic_directory(target) as scratch:
        files = TokenFiles(scratch, tokenizer, config.max_length, inspection.counts)
        for source_split in _READING_ORDER:
            for record in _assign_splits(source_split, sources, config, held_out):
                inspection.read[record.path, source_split] += 1
                chosen = source_split != "train" or in_subset(record)
                if chosen:
                    inspection.count(record)
                if not record.reason and (chosen or record.split != "train"):
                    files.add(record.split, {"row": record.number, **record.row})
            files.flush()  # data_sha256 depends on the order of writing: one source split after another
        files.close()
        check_sources()
        inspection.check()
        meta = {
            "config": asdict(config),
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "dtype": files.dtype.str,
            "counts": asdict(inspection.counts),
            "sources": [
                {"file": str(path), "split": split, "rows": inspection.read[path, split]}
                for split, paths in sources.items()
                for path in paths
            ],
            "data_sha256": files.digest.hexdigest(),
            "files": {path.name: sha256_file(path) for path in sorted(scratch.iterdir())},
        }
        write_meta(scratch, meta)
    return meta


def small_splits(rows: Mapping[str, int], sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each held-out split with too few rows to decide anything.

    Args:
        rows: kept, by split.
        sources: for each file read its split and the number of its rows, as in meta.json.
    """
    train = sum(source["rows"] for source in sources if source["split"] == "train")
    own = {source["split"] for source in sources}
    uses = {"validation": "they choose the best step", "test": "they say whether a model is better"}
    warnings = []
    for split, use in uses.items():
        if rows[split] >= FEWEST_ROWS:
            continue
        share = _ENOUGH / train if train else 1.0
        if split in own:
            remedy = f"add rows to the files of {split}"
        elif share > 0.5:
            remedy = f"add rows, or a file with the word {split} in its name"
        else:
            remedy = f"set {split}_share={math.ceil(share * 1000) / 1000:g}, or add rows"
        warnings.append(
            f"the {split} split has {rows[split]} rows, and {use}: with fewer than {FEWEST_ROWS} that is mostly "
            f"chance; {remedy}"
        )
    return warnings


def training_keys(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, config: PrepareConfig
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The content keys of all rows that ``prepare`` would train on, and of those that it would hold out.

    Args:
        config: its subset is ignored.

    Returns:
        Two arrays of uint64, each key once, in the order of the source.

    Raises:
        ValueError: too many unusable rows.
    """
    inspection = _Inspection(sources, config)
    held_out: set[bytes] = set()
    keys: dict[str, dict[int, None]] = {"train": {}, "held out": {}}
    for source_split in _READING_ORDER:
        for record in _assign_splits(source_split, sources, config, held_out):
            inspection.count(record)
            if record.reason:
                continue
            if record.split == "train" and _too_long(record.row["prompt"], tokenizer, config.max_length):
                continue
            keys["train" if record.split == "train" else "held out"][row_key(record.row)] = None
    inspection.check_unusable()
    train, rest = (np.fromiter(found, dtype=np.uint64, count=len(found)) for found in keys.values())
    return train, rest


def _too_long(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    """Whether the prompt leaves no room for a response token.

    A token is at least one byte long, so a prompt with fewer bytes than ``max_length`` need not be encoded.
    """
    if len(format_prompt({"prompt": prompt}).encode()) < max_length:
        return False
    return len(encode_prompts(tokenizer, [prompt])[0]) >= max_length


@dataclass(frozen=True)
class _AssignedRecord:
    """A record with the split that it is assigned to, or with the reason why it is dropped.

    Attributes:
        number: position in the source split, over all its files, from 0.
        in_file: position in its file, from 0.
        path: its file.
        split: split that it is assigned to.
        row: the normalised row; empty where the record is unusable.
        reason: why it is dropped; None where it is kept.
    """

    number: int
    in_file: int
    path: Path
    split: str
    row: dict[str, Any]
    reason: str | None = None


def _assign_splits(
    source_split: str, sources: Sources, config: PrepareConfig, held_out: set[bytes]
) -> Iterator[_AssignedRecord]:
    """The records of a source split in order, each with the split that it is assigned to.

    Args:
        held_out: prompt keys of the held-out files read so far; those of this split are added.
    """
    for number, (in_file, path, record) in enumerate(_records(sources.get(source_split, []))):
        try:
            row = normalize_row(record)
        except UnusableRow as error:
            yield _AssignedRecord(number, in_file, path, source_split, {}, error.reason)
            continue
        key = prompt_key(row["prompt"])
        split = source_split
        if split != "test" and key in held_out:
            yield _AssignedRecord(number, in_file, path, split, row, IN_HELD_OUT)
            continue
        if split != "train":
            held_out.add(key)
        elif "test" not in sources and fraction(key, config.split_seed, "test") < config.test_share:
            split = "test"
        elif "validation" not in sources and fraction(key, config.split_seed, "validation") < config.validation_share:
            split = "validation"
        yield _AssignedRecord(number, in_file, path, split, row)


def _records(paths: Sequence[Path]) -> Iterator[tuple[int, Path, Any]]:
    """Records with their position in their file, from 0."""
    for path in paths:
        for in_file, record in enumerate(read_records(path)):
            yield in_file, path, record


def _subset_test(config: PrepareConfig) -> Callable[[_AssignedRecord], bool]:
    """The test whether a record of train is in the subset: by content if keys are given, else by position."""
    if config.subset_keys is not None:
        keys = frozenset(np.load(config.subset_keys, allow_pickle=False).tolist())
        return lambda record: bool(record.row) and row_key(record.row) in keys
    start, count = config.subset_start, config.subset_count
    return lambda record: record.number >= start and (count is None or record.number < start + count)


class _Inspection:
    """Counts the records read, remembers the first five unusable ones, and checks the counts against the limits.

    Args:
        sources: named in errors.
        config: the limits.
    """

    def __init__(self, sources: Sources, config: PrepareConfig):
        self.counts = Counts()
        self.read: Counter[tuple[Path, str]] = Counter()  # records read, by file and split
        self._config = config
        self._files = ", ".join(str(path) for paths in sources.values() for path in paths)
        self._first_unusable: list[str] = []

    def count(self, record: _AssignedRecord) -> None:
        self.counts.seen += 1
        if record.reason:
            self.counts.drop(record.reason)
        if record.reason in UNUSABLE and len(self._first_unusable) < 5:
            self._first_unusable.append(f"{record.path.name} row {record.in_file} ({record.reason})")

    def check_unusable(self) -> None:
        """Raise ValueError if more than max_dropped_share of the records are unusable."""
        seen, unusable = self.counts.seen, sum(self.counts.dropped.get(reason, 0) for reason in UNUSABLE)
        if seen and unusable / seen > self._config.max_dropped_share:
            raise ValueError(
                f"{unusable} of {seen} rows of {self._files} cannot be used, more than max_dropped_share "
                f"{self._config.max_dropped_share:g} allows; the first, counted from 0: "
                f"{'; '.join(self._first_unusable)}. Rows have {describe_schemas()}"
            )

    def check(self) -> None:
        """Raise ValueError if too many records are unusable or a split is empty."""
        self.check_unusable()
        counts, config = self.counts, self._config
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.dropped.items())) or "none dropped"
        if not counts.seen and not config.subset_start:
            raise ValueError(f"there is no row in {self._files}: is the file complete?")
        if not counts.rows["train"]:
            raise ValueError(
                f"no training row is left of {self._files} (subset_start {config.subset_start}, subset_count "
                f"{config.subset_count}, max_length {config.max_length}; {dropped})"
            )
        for split, setting in (("validation", "validation_share"), ("test", "test_share")):
            if not counts.rows[split]:
                enough = 5 / counts.seen  # five rows are expected then; 0.7 % of all draws give none
                if enough > 0.5:
                    raise ValueError(
                        f"the {split} split of {self._files} is empty, and {counts.seen} rows are too few to draw it "
                        f"from: add rows, or a file with the word {split} in its name ({dropped})"
                    )
                raise ValueError(
                    f"the {split} split of {self._files} is empty: raise {setting}, {enough:.2g} will do, or add "
                    f"rows ({dropped})"
                )
