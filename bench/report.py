"""Progress lines, aligned columns and the final output, common to all benchmarks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.files import write_json


class Progress:
    """Prints messages with the seconds since this object was created."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def __call__(self, message: str) -> None:
        print(f"[{time.perf_counter() - self.begin:6.1f} s] {message}", flush=True)


def align(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of text in which the cells of a column have one width.

    Args:
        lines: cells of each line, as many in each.
        left: number of columns, from the first, that are aligned to the left; the others are aligned to the right.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def print_report(table: str, report: dict[str, Any], out: Path | None) -> None:
    """Print the table and, as the last line, the report as JSON.

    Args:
        out: file for the same JSON, indented; None writes no file.
    """
    print("\n" + table + "\n", flush=True)
    if out:
        write_json(out, report)
    print(json.dumps(report), flush=True)
