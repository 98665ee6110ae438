"""Rows of an instruction set: read from files of any type in READERS, normalised from any schema in SCHEMAS."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
# Beginnings of file names in a folder; files with any other name are train.
_SPLIT_NAMES = {"test": ("test",), "validation": ("val", "dev", "eval")}

# Reasons for which a row cannot be used at all; the share of these is bounded by max_dropped_share.
UNUSABLE = (
    "invalid_json",
    "invalid_unicode",
    "not_an_object",
    "missing_field",
    "null_field",
    "not_a_string",
    "empty_field",
    "tests_not_strings_in_a_list",
)
# Reasons that do not make a row unusable: longer than max_length, or its prompt is also in a held-out split.
PROMPT_TOO_LONG = "prompt_too_long"
IN_HELD_OUT = "prompt_in_held_out"


class UnusableRow(ValueError):
    """A row that cannot be trained on; ``reason`` is one of UNUSABLE."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def find_splits(source: Path) -> dict[str, list[Path]]:
    """The data files of a file or folder, by split.

    A single file is train. In a folder, files whose names begin with ``test`` are test, with ``val``,
    ``dev`` or ``eval`` validation, and all others train, as on the Hugging Face hub.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no file of a known type.
        ValueError: a single file of an unknown type, or a folder with no training file.
    """
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ValueError(f"{source} is none of {', '.join(SUFFIXES)}")
        return {"train": [source]}
    if not source.is_dir():
        raise FileNotFoundError(
            f"dataset {source} does not exist: give a file or folder, or a hub id like owner/name"
        )
    splits: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        if path.suffix in SUFFIXES and path.is_file():
            name = path.name.lower()
            split = next((split for split, starts in _SPLIT_NAMES.items() if name.startswith(starts)), "train")
            splits.setdefault(split, []).append(path)
    if not splits:
        raise FileNotFoundError(f"dataset folder {source} holds no file of {', '.join(SUFFIXES)}")
    if "train" not in splits:
        raise ValueError(f"dataset folder {source} holds no training file, only {', '.join(splits)}")
    return splits


def read_records(path: Path) -> Iterator[Any]:
    """Yield a file's records in order; an UnusableRow stands in for a line that cannot be read.

    Args:
        path: a file with one of SUFFIXES.

    Raises:
        ValueError: the file as a whole cannot be read; the message names it.
    """
    try:
        yield from READERS[path.suffix](path)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except UnicodeDecodeError:
                yield UnusableRow("invalid_unicode")
            except (ValueError, RecursionError):  # RecursionError: nested too deeply
                yield UnusableRow("invalid_json")


def _read_json(path: Path) -> Iterator[Any]:
    records = json.loads(path.read_bytes())
    if not isinstance(records, list):
        raise ValueError("it is not a list of rows")
    yield from records


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Any]:
    import pandas as pd

    # As text, empty cells as empty strings: pandas would turn "NA" or "1" into something else.
    for frame in pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=10_000):
        yield from frame.to_dict("records")


READERS: Mapping[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
"""File types by suffix. A reader yields a file's records in order, and raises ValueError or OSError if it cannot."""

SUFFIXES = tuple(READERS)


def normalize_row(record: Any) -> dict[str, Any]:
    """Bring a record of any of SCHEMAS to ``prompt`` and ``completion``; ``tests`` and ``family`` are kept.

    ``tests`` are assert statements that a right completion passes; ``family`` groups rows in the report.

    Raises:
        UnusableRow: with the reason.
    """
    if isinstance(record, UnusableRow):
        raise record
    if not isinstance(record, dict):
        raise UnusableRow("not_an_object")
    for fields, convert in SCHEMAS.items():
        if all(field in record for field in fields):
            prompt, completion = convert(record)
            break
    else:
        raise UnusableRow("missing_field")
    row: dict[str, Any] = {"prompt": prompt, "completion": completion}
    tests = record.get("tests")
    if tests is not None:
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise UnusableRow("tests_not_strings_in_a_list")
        row["tests"] = tests
        row["family"] = str(record.get("family") or "all")
    return row


def _prompt_completion(record: dict[str, Any]) -> tuple[str, str]:
    """The schema of CodeAlpaca's copy on the Hugging Face hub."""
    return _text(record, "prompt"), _text(record, "completion")


def _instruction_output(record: dict[str, Any]) -> tuple[str, str]:
    """The original CodeAlpaca's schema, joined as in the copy on the hub: instruction, newline, optional input."""
    prompt, completion = _text(record, "instruction"), _text(record, "output")
    if record.get("input") and str(record["input"]).strip():
        prompt = f"{prompt}\n{_text(record, 'input')}"
    return prompt, completion


SCHEMAS: Mapping[tuple[str, ...], Callable[[dict[str, Any]], tuple[str, str]]] = {
    ("prompt", "completion"): _prompt_completion,
    ("instruction", "output"): _instruction_output,
}
"""Row schemas by their required fields; the first whose fields a record has converts it to prompt and completion."""


def _text(record: dict[str, Any], field: str) -> str:
    """A field's text; raises UnusableRow unless it is a non-blank string of valid Unicode."""
    value = record[field]
    if value is None:
        raise UnusableRow("null_field")
    if not isinstance(value, str):
        raise UnusableRow("not_a_string")
    if not value.strip():
        raise UnusableRow("empty_field")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise UnusableRow("invalid_unicode") from None
    return value


def prompt_key(prompt: str) -> bytes:
    """Equal for prompts that differ only in case, white space or Unicode form."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def row_key(row: dict[str, Any]) -> int:
    """A 64-bit hash of a normalised row's content; its file and position play no part.

    The probability that any two of a million different rows share a hash is 3e-8.
    """
    digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def fraction(key: bytes, seed: int, purpose: str) -> float:
    """A uniform number in [0, 1) that depends on the prompt, the seed and the purpose alone.

    So a row stays in its split when the data set grows or is read in another order, and rows with the same prompt
    always share a split.
    """
    digest = hashlib.blake2b(key + f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
