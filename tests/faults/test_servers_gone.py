"""Servers that are killed during a training: it goes on at full speed, and what they missed arrives later."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import LONG, SHORT, Run, Webhook
from installation import Installation
from made_up import BIN, wait_for

pytestmark = pytest.mark.slow


def _journal(platform: Installation) -> Path:
    """The journal of the only training."""
    (path,) = (platform.base / "data" / "trainings").glob("*/metrics.jsonl")
    return path


def _steps(platform: Installation) -> int:
    return _journal(platform).read_bytes().count(b"train/loss")


def _speed(platform: Installation, seconds: float) -> float:
    """Steps per second over the next seconds."""
    before, began = _steps(platform), time.monotonic()
    time.sleep(seconds)
    return (_steps(platform) - before) / (time.monotonic() - began)


def _progress(platform: Installation, run: Run) -> int:
    """The step that Prefect's progress bar shows; 0 without one."""
    query = {"artifacts": {"flow_run_id": {"any_": [run.id]}, "key": {"any_": ["train-progress"]}}}
    found = platform.api("/artifacts/filter", query)
    return int(found[-1]["description"].split("/")[0].removeprefix("step ")) if found else 0


@pytest.mark.parametrize("gone", [["prefect"], ["prefect", "mlflow"]], ids="+".join)
def test_a_training_keeps_its_speed_without_servers(
    platform: Installation, submit: Callable[..., Run], gone: list[str]
) -> None:
    """FAULTS 43: full speed while they are away, and metrics and progress go on within a minute of their return."""
    for path in (platform.base / "data").glob("trainings/*/metrics.jsonl"):
        path.unlink()
    run = submit({**LONG, "seed": 100 + len("".join(gone))})
    run.wait_until_it_trains()
    wait_for("the progress bar", lambda: _progress(platform, run), 40)
    with_servers = _speed(platform, 10)
    for name in gone:
        platform.kill(name)
    without = [_speed(platform, 10) for _ in range(3)]
    print(f"{with_servers:.1f} steps/s with {gone}, then without {[round(speed, 1) for speed in without]}")
    assert min(without) > with_servers / 3
    back = _steps(platform)
    for name in gone:
        getattr(platform, f"start_{name}")()
    began = time.monotonic()
    wait_for("the progress bar", lambda: _progress(platform, run) > back, 60)
    print(f"the progress bar goes on after {time.monotonic() - began:.1f} s")
    wait_for("the metrics", lambda: len(run.losses) > back, 75)
    print(f"the metrics go on after {time.monotonic() - began:.1f} s")
    steps = [point.step for point in run.losses]
    assert steps == list(range(1, len(steps) + 1))
    assert [json.loads(line)["step"] for line in _journal(platform).read_text().splitlines()[:3]] == [0, 1, 2]
    assert run.state["type"] == "RUNNING"


def test_mlflow_gone_to_the_end_is_trained_but_not_logged(
    platform: Installation, submit: Callable[..., Run], webhook: Webhook
) -> None:
    """FAULTS 23: the state says so; the command in its message logs all when MLflow is back."""
    run = submit({**SHORT, "epochs": 1000, "max_steps": 300, "eval_freq": 1000, "seed": 8})
    run.wait_until_it_trains()
    platform.kill("mlflow")
    state = run.wait_for_state("TrainedNotLogged", 240)
    message = state["message"]
    print(message)
    assert state["type"] == "FAILED"
    (kept,) = (platform.base / "data" / "trainings").glob("*/step-00000300")
    assert str(kept.parent) in message
    platform.start_mlflow()
    assert run.mlflow.info.status == "RUNNING"
    run.wait_for_both("FAILED", "FAILED", 65)
    assert any(f"failed: {run.prefect['name']}" in text for text in webhook.texts)

    command = shlex.split(message.partition("without training again: ")[2])
    output, _ = platform.command(str(BIN / command[0]), *command[1:]).communicate(timeout=60)
    again = Run(platform, re.findall(r"UUID: (\S+)", output)[0])
    again.wait_for_both("COMPLETED", "FINISHED", 300)
    assert [point.step for point in again.losses] == list(range(1, 301))
    assert max(point.timestamp for point in again.losses) < again.mlflow.info.start_time
    assert not kept.exists()
