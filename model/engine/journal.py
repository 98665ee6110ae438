"""The journal of a training's metrics: one JSON line per step, written to the local disk first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsJournal:
    """An append-only JSONL file of ``{"step", "time" (ms), "metrics": {name: value}}``."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = len(read_journal(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.truncate(self.lines)  # a killed process may have left half a line

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line; it is not lost if the process is killed afterwards."""
        record = {"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)}
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.lines += 1

    def truncate(self, lines: int) -> None:
        """Keep the first ``lines`` lines; a resumed training writes the others again, with equal metrics."""
        kept = self.path.read_bytes().splitlines(keepends=True)[:lines]
        with self.path.open("r+b") as stream:
            stream.truncate(sum(map(len, kept)))
            os.fsync(stream.fileno())
        self.lines = len(kept)


def read_journal(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The complete lines of a journal from number ``start`` on; none if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: half a line, or nothing
    return [json.loads(line) for line in lines[start:]]
