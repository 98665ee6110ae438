"""Rows 21 and 24 of the table of faults: MLflow does not answer when a run starts; its sqlite file is locked."""

from __future__ import annotations

import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from made_up import wait_for
from world import World

pytestmark = pytest.mark.slow
LONG = {"epochs": 1000, "eval_freq": 5000, "batch_size": 8}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as made:
        yield made


def test_row_21_mlflow_down_at_start(world: World) -> None:
    """A dead port: the run fails within 30 s, and its state names the address and the setting."""
    output = world.run({}, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "\nFailed " in output, output[-3000:]
    ((began, ended, message),) = world.query(
        "select r.start_time, r.end_time, s.message from flow_run r join flow_run_state s on r.state_id = s.id"
    )
    seconds = (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
    assert seconds <= 30
    assert "127.0.0.1" in message
    assert world.journal() == []


def _wait_for_steps(world: World, run: subprocess.Popen[str], count: int) -> None:
    def trained() -> bool:
        assert run.poll() is None, world.finish(run)[-3000:]
        return len(world.journal()) >= count

    wait_for(f"{count} steps", trained, 120)


@pytest.mark.parametrize(("seconds", "last"), [(5, 500), (30, 1500)])
def test_row_24_a_locked_database(seconds: int, last: int, world: World) -> None:
    """MLflow's sqlite file is locked in mid-training: steps go on meanwhile, and in the end no point is missing."""
    run = world.begin({**LONG, "max_steps": last})
    _wait_for_steps(world, run, 20)
    with closing(sqlite3.connect(world.database, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        before = len(world.journal())
        time.sleep(seconds)
        assert run.poll() is None, world.finish(run)[-3000:]
        assert len(world.journal()) > before, "the training waits for the database"
        other.execute("ROLLBACK")
    output = world.finish(run, 600)
    assert "\nCompleted " in output, output[-3000:]
    with closing(sqlite3.connect(world.database)) as connection:
        steps = connection.execute("select step from metrics where key = 'train/loss' order by step").fetchall()
    assert [step for (step,) in steps] == list(range(1, last + 1))
