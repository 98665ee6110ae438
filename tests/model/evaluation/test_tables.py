"""Base and tuned model side by side in tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.data.tokens import CodeAlpacaDataset
from model.evaluation.completions import Completion
from model.evaluation.tables import row_table, sample_table


def test_row_table_is_per_token(token_dir: Path) -> None:
    """Nats per response token, beside the row's number in the source."""
    dataset = CodeAlpacaDataset(token_dir, "test", limit=2)
    counts = np.array([10, 4])
    table = row_table(dataset.rows, counts, np.array([50.0, 8.0]), np.array([20.0, 4.0]))
    assert [(row["base_loss"], row["loss"], row["tokens"]) for row in table] == [(5.0, 2.0, 10), (2.0, 1.0, 4)]
    assert [row["prompt"] for row in table] == [row["prompt"] for row in dataset.rows]
    assert [row["row"] for row in table] == [row["row"] for row in dataset.rows]


def test_sample_table_puts_them_side_by_side() -> None:
    """Reference, base and tuned, not exchanged."""
    rows = [{"row": 4, "prompt": "p", "completion": "c"}]
    assert sample_table(rows, [Completion("b", False)], [Completion("t", True)]) == [
        {
            "row": 4, "prompt": "p", "reference": "c",
            "base": "b", "base_stopped": False, "tuned": "t", "tuned_stopped": True,
        }
    ]  # fmt: skip
