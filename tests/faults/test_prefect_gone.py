"""Row 26 of the table of faults: Prefect's server is killed when a training ends, and does not come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import wait_for
from world import World

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        made.start_prefect()
        yield made


def test_row_26_the_finished_checkpoint_survives(world: World) -> None:
    """The run fails without Prefect; with a new server the next run takes the training and trains no step."""
    parameters = {"max_steps": STEPS, "eval_freq": 100, "batch_size": 8, "eval_rows": 1000, "sample_rows": 64}
    run = world.begin(parameters)
    wait_for("the last step", lambda: (steps := world.journal()) and steps[-1]["step"] == STEPS, 120)
    world.kill("prefect")
    output = world.finish(run, 900)
    assert run.returncode != 0 or "\nCompleted " not in output, "the run could not have told its end"
    journal = world.journal()
    assert journal[-1]["step"] == STEPS, output[-3000:]
    (training,) = (world.base / "data" / "trainings").iterdir()
    assert list(training.glob("step-*")), "the checkpoint is there"

    world.start_prefect()
    output = world.run(parameters)
    assert "\nCompleted " in output, output[-3000:]
    assert f"this training was resumed at step {STEPS}" in output
    assert not training.exists(), "MLflow has all of it"
