"""What runs are called: their size and what tells them from other runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from flows.commands import read_parameters
from flows.job import Job
from flows.naming import name_run
from flows.trials import SweepJob

NIGHT = datetime(2026, 3, 29, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("deployment", "changes", "name"),
    [
        ("tiny", {}, "tiny lr 3e-3 top 2"),
        ("355m", {}, "355m lr 1e-4 top 4"),
        ("355m", {"learning_rate": 3e-4, "num_unfrozen_layers": 8}, "355m lr 3e-4 top 8"),
        ("355m", {"learning_rate": 1.5e-4, "dropout": 0.1}, "355m lr 1.5e-4 top 4, dropout 0.1"),
        ("124m", {"freeze_layers": False}, "124m lr 1e-4 all blocks"),
        ("124m", {"dataset": "/data/of mine/rows.jsonl"}, "124m lr 1e-4 top 4, dataset rows.jsonl"),
        ("124m", {"start_from": "models:/gpt2-code-124m/3"}, "124m lr 1e-4 top 4, from models:/gpt2-code-124m/3"),
        ("124m", {"seed": 7, "split_seed": 8}, "124m lr 1e-4 top 4, split_seed 8, seed 7"),
        # What changes no model is left out.
        ("124m", {"device": "cpu", "temperature": 0, "sample_rows": 3, "eval_freq": 7}, "124m lr 1e-4 top 4"),
        ("nightly", {}, "355m night 2026-03-29 lr 1e-4 top 4"),
        ("nightly", {"subset_count": 500}, "355m night 2026-03-29 lr 1e-4 top 4, subset_count 500"),
        ("sweep-tiny", {}, "tiny sweep lr x4 top 2"),
        ("sweep-355m", {"grid": {"seed": [1, 2], "num_unfrozen_layers": [2]}}, "355m sweep seed x2 top x1 lr 1e-4"),
        ("355m", {"run_name": "my run"}, "my run"),
    ],
)  # fmt: skip
def test_a_run_is_called_by_what_it_is(deployment: str, changes: dict[str, Any], name: str) -> None:
    kind = SweepJob if deployment.startswith("sweep") else Job
    assert name_run("violet-cow", read_parameters(deployment) | changes, kind, NIGHT) == name


def test_a_name_that_the_user_gave_in_prefect_stays() -> None:
    assert name_run("before the change of rows", {}) == "before the change of rows"
    assert name_run("before", {"run_name": "after"}) == "after"


def test_a_name_is_not_long() -> None:
    """Of many changes those that fit are named, and the others are counted."""
    changes = {"epochs": 5, "max_steps": 12345, "batch_size": 7, "weight_decay": 0.5, "warmup_ratio": 0.25, "seed": 5}
    name = name_run("violet-cow", changes)
    assert name == "124m lr 1e-4 top 4, seed 5, epochs 5, max_steps 12345, batch 7, weight_decay 0.5, 1 more"
    assert len(name_run("violet-cow", {"dataset": "x" * 5000})) < 200
