"""Training in several processes: it equals a training in one, resumes bit for bit, and all ranks end together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gang import Gang, Outcome, Training, run_alone, run_training

from model.engine.journal import read_journal

CONFIG = {
    "epochs": 50,
    "max_steps": 100,
    "batch_size": 8,  # neither a multiple of 3, nor a divisor of the number of rows
    "micro_batch_tokens": 130,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "eval_freq": 40,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def gangs() -> Iterator[dict[int, Gang]]:
    """Two and three ranks, for tests that leave them alive."""
    found = {world: Gang(world) for world in (2, 3)}
    yield found
    for gang in found.values():
        gang.end()


def metrics_of(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics of a journal, but for those that depend on the clock."""
    clocked = ("train/tokens_per_second", "train/mfu")
    lines = read_journal(directory / "metrics.jsonl")
    return [(line["step"], {k: v for k, v in line["metrics"].items() if k not in clocked}) for line in lines]


def assert_close(got: Path, want: Path, outcome: Outcome, wanted: Outcome) -> None:
    """Journals and weights agree to 1e-10."""
    pairs = list(zip(metrics_of(got), metrics_of(want), strict=True))
    for (step, some), (its, others) in pairs:
        assert step == its
        assert some == pytest.approx(others, rel=1e-10, abs=1e-10)
    for name, weight in wanted.weights.items():
        np.testing.assert_allclose(outcome.weights[name], weight, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"batch_size": 1}, {}, id="ranks without rows"),
        pytest.param({"dropout": 0.2, "batch_size": 7}, {}, id="dropout"),
        pytest.param({"prompt_loss_weight": 0.3}, {"train_head": True}, id="prompts and head"),
        pytest.param({"dropout": 0.1}, {"unfrozen": None}, id="everything"),
        pytest.param({"dropout": 0.1}, {"cache": {"max_bytes": 0}}, id="nothing kept"),
    ],
)
def test_ranks_agree_with_one_process(
    gangs: dict[int, Gang],
    gpt2_dir: Path,
    token_dir: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """One, two and three ranks agree to 1e-10 over 100 steps; the ranks of a gang have equal weights."""
    training = Training(gpt2_dir, token_dir, {**CONFIG, **settings}, **options)
    want = run_alone(training, tmp_path / "1")
    assert want.result is not None
    for world, gang in gangs.items():
        outcomes = gang.call(run_training, training, tmp_path / str(world))
        assert_close(tmp_path / str(world), tmp_path / "1", outcomes[0], want)
        for outcome in outcomes:
            assert outcome.error == ""
            assert all(np.array_equal(outcome.weights[name], weight) for name, weight in outcomes[0].weights.items())
