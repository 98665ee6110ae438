"""Base and tuned model side by side, as records for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.evaluation.completions import Completion

Array = np.ndarray[Any, Any]


def row_table(rows: Sequence[Mapping[str, Any]], tokens: Array, base: Array, tuned: Array) -> list[dict[str, Any]]:
    """One record per row: its number in the source, prompt, response tokens, loss of both models.

    Args:
        rows: R rows of the test split.
        tokens: (R,) response tokens.
        base: (R,) the base's summed losses in nats; the table has nats per token.
        tuned: (R,) the tuned model's.
    """
    return [
        {
            "row": row["row"],
            "prompt": row["prompt"],
            "tokens": int(count),
            "base_loss": float(before / count),
            "loss": float(after / count),
        }
        for row, before, after, count in zip(rows, base, tuned, tokens, strict=True)
    ]


def sample_table(
    rows: Sequence[Mapping[str, Any]], base: Sequence[Completion], tuned: Sequence[Completion]
) -> list[dict[str, Any]]:
    """One record per prompt: reference, both completions, and which of them stopped by itself."""
    return [
        {
            "row": row["row"],
            "prompt": row["prompt"],
            "reference": row["completion"],
            "base": before,
            "base_stopped": before_stopped,
            "tuned": after,
            "tuned_stopped": after_stopped,
        }
        for row, (before, before_stopped), (after, after_stopped) in zip(rows, base, tuned, strict=True)
    ]


def pass_table(
    rows: Sequence[Mapping[str, Any]], base: Sequence[bool], tuned: Sequence[bool]
) -> list[dict[str, Any]]:
    """One record per task family: rows with tests, and the share of them that each model's completion passes."""
    families: dict[str, list[tuple[bool, bool]]] = {}
    for row, before, after in zip(rows, base, tuned, strict=True):
        families.setdefault(row["family"], []).append((before, after))
    return [
        {
            "family": family,
            "rows": len(passes),
            "base": sum(before for before, _ in passes) / len(passes),
            "tuned": sum(after for _, after in passes) / len(passes),
        }
        for family, passes in sorted(families.items())
    ]
