"""The journal of a training's metrics: one JSON line per step, written to the local disk first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import with_config
from typing_extensions import TypedDict

from model.files import naming_a_full_disk, read_bytes
from model.records import parse_record


@with_config(extra="forbid")
class JournalLine(TypedDict):
    """A line of a journal: ``time`` in ms, metrics by name. A key beside these is a sign of damage."""

    step: int
    time: int
    metrics: dict[str, float]


class MetricsJournal:
    """An append-only JSONL file of ``{"step", "time" (ms), "metrics": {name: value}}``.

    Raises:
        ValueError: something else than a file stands at its path.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if (path.exists() or path.is_symlink()) and not path.is_file():
            raise ValueError(f"{path} is not a file: remove it")
        path.touch()
        self.truncate(len(_lines(path)))  # a killed process may have left half a line

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; it is not lost if the process is killed afterwards.

        Raises:
            DiskFullError: the disk is full.
        """
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)}) + "\n"
        with naming_a_full_disk(self.path, len(line)), self.path.open("a") as stream:
            stream.write(line)
        self.lines += 1

    def truncate(self, lines: int) -> None:
        """Keep the first ``lines`` lines; a resumed training writes the others again, with equal metrics."""
        kept = _lines(self.path)[:lines]
        with self.path.open("r+b") as stream:
            stream.truncate(sum(len(line) + 1 for line in kept))
            os.fsync(stream.fileno())
        self.lines = len(kept)


def read_journal(path: Path, start: int = 0) -> list[JournalLine]:
    """The complete lines of a journal from number ``start`` on; none if the file does not exist.

    Raises:
        ValueError: a line is damaged; the message names it.
    """
    lines = _lines(path) if path.exists() else []
    return [_parse(path, number, line) for number, line in enumerate(lines[start:], start + 1)]


def check_journal(path: Path, lines: int, step: int, eval_losses: Mapping[int, float]) -> None:
    """Check that the first lines of a journal are those of all steps up to one, none missing and none twice.

    A journal begins with the validation of the base, step 0. Every step has a line, and a second one if a validation
    followed it.

    Args:
        lines: number of lines to check.
        step: the last step.
        eval_losses: validation losses by step that the journal must have.

    Raises:
        ValueError: a line is damaged or missing; the message names the file and the line.
    """
    found = _lines(path)[:lines] if path.exists() else []
    if len(found) < lines:
        raise ValueError(f"{path} has {len(found)} lines, and the checkpoint of step {step} was saved after {lines}")
    before, was_validation = 0, False
    for number, text in enumerate(found, 1):
        line = _parse(path, number, text)
        validation = "train/loss" not in line["metrics"]
        expected = before if validation else before + 1
        if line["step"] != expected or (validation and was_validation) or (number == 1 and not validation):
            raise ValueError(f"{path} line {number} is of step {line['step']}: lines before it are missing or twice")
        loss = line["metrics"].get("eval/loss")
        if validation and line["step"] in eval_losses and loss != eval_losses[line["step"]]:
            raise ValueError(f"{path} line {number} has the validation loss {loss}, not that of the checkpoint")
        before, was_validation = line["step"], validation
    if before != step:
        raise ValueError(f"{path} is at step {before} in line {lines}, and the checkpoint at step {step}")


def _lines(path: Path) -> list[bytes]:
    """The complete lines, without their newlines; what stands behind the last newline is half a line, or nothing.

    Raises:
        ValueError: it is no file, or cannot be read.
    """
    try:
        return read_bytes(path).split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _parse(path: Path, number: int, line: bytes) -> JournalLine:
    return parse_record(line, JournalLine, f"{path} line {number}")
