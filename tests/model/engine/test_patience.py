"""Early stopping: when a training ends early, and that only trainings with patience have another identity."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from model.engine.config import TrainConfig
from model.engine.patience import early_end, ran_out


@pytest.mark.parametrize(
    ("patience", "step", "best_step", "ends"),
    [
        (None, 10_000, 0, False),
        (1, 5, 5, False),
        (1, 9, 5, False),  # between two validations
        (1, 10, 5, True),
        (3, 15, 5, False),
        (3, 20, 5, True),
        (3, 15, 0, True),  # no validation was better than that of the base
    ],
)
def test_when_a_training_ends_early(patience: int | None, step: int, best_step: int, ends: bool) -> None:
    assert ran_out(step, best_step, TrainConfig(eval_freq=5, patience=patience)) is ends


def test_earlier_trainings_keep_their_identity() -> None:
    """Without patience the determinants are those that a training had before there was patience."""
    found = TrainConfig().determinants()
    assert found == {name: value for name, value in asdict(TrainConfig()).items() if name != "patience"}
    assert TrainConfig(patience=2).determinants() == {**found, "patience": 2}


def test_the_sentence() -> None:
    sentence = early_end(18, 40, TrainConfig(patience=3))
    assert sentence == "ended early after step 18 of 40: 3 validations in a row found no lower loss (patience)"
