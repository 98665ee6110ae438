"""Faults of a training in several processes, with real servers, a real worker and the watcher.

Two processes on the CPU stand for two GPUs. Each test asks the same: within 30 s no process of the gang is left, the
lock is free as soon as the run has ended, a checkpoint is there, both sides have the run's end, and the training goes
on from the checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty import SHORT, Run
from installation import Installation
from made_up import BIN, wait_for

from ops.machine.lock_file import read_locks

pytestmark = pytest.mark.slow
TRAINING = {
    **SHORT,
    "epochs": 1000,
    "max_steps": 240,
    "eval_freq": 20,
    "eval_rows": 20,
    "subset_count": 400,
    "gpus": 2,
}


def _steps(platform: Installation, seed: int) -> int:
    """The newest step in the training's journal; 0 without one."""
    try:
        lines = (platform.training(seed) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except (ValueError, FileNotFoundError):  # it has not begun
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _checkpoint(platform: Installation, seed: int) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in platform.training(seed).glob("step-*"))


def _gang(run: Run) -> dict[str, list[psutil.Process]]:
    """The processes of a run's gang: torchrun, and its ranks."""
    (torchrun,) = psutil.Process(run.process.pid).children()
    assert "ops.machine.torchrun" in torchrun.cmdline()
    ranks = torchrun.children()
    assert all("tasks.rank_worker" in rank.cmdline() for rank in ranks)
    return {"torchrun": [torchrun], "ranks": ranks}


def _begin(
    platform: Installation, submit: Callable[..., Run], seed: int, steps: int = 50, max_steps: int = 240
) -> tuple[Run, dict[str, Any]]:
    """A run whose two ranks have trained as many steps as told."""
    parameters = {**TRAINING, "seed": seed, "max_steps": max_steps}
    run = submit(parameters)
    wait_for(f"{steps} steps", lambda: _steps(platform, seed) >= steps, 240)
    return run, parameters


def _wait_for_the_end(processes: list[psutil.Process], began: float) -> None:
    def living() -> list[psutil.Process]:
        return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    wait_for("the end of the gang", lambda: not living(), 30)
    print(f"the gang is gone after {time.time() - began:.1f} s")


def _check_locks(platform: Installation) -> None:
    held = [lock.what for lock in read_locks(Path(platform.environment["FINETUNE_LOCKS"])) if lock.held]
    assert held == []
    assert platform.api("/v2/concurrency_limits/tag:gpu")["active_slots"] == 0


@pytest.mark.parametrize(
    ("victim", "number", "seed"),
    [("ranks", signal.SIGKILL, 101), ("ranks", signal.SIGSTOP, 102), ("torchrun", signal.SIGKILL, 103)],
)
def test_the_retry_goes_on_after_a_rank_or_torchrun(
    platform: Installation, submit: Callable[..., Run], victim: str, number: int, seed: int
) -> None:
    """All ranks end, the task is tried again, and completes the run: no step is missing or twice in MLflow."""
    run, _ = _begin(platform, submit, seed)
    gang = _gang(run)
    assert [len(gang[name]) for name in ("torchrun", "ranks")] == [1, 2]
    flow, step = run.process, _checkpoint(platform, seed)
    assert step >= 20
    began = time.time()
    os.kill(gang[victim][-1].pid, number)
    _wait_for_the_end([*gang["torchrun"], *gang["ranks"]], began)
    run.wait_for_both("COMPLETED", "FINISHED", 300)
    assert run.process == flow
    assert f"this training was resumed at step {step}" in run.logs
    said = {
        ("ranks", signal.SIGKILL): "died",
        ("ranks", signal.SIGSTOP): "has given no sign of life for 20 s",
        ("torchrun", signal.SIGKILL): "torchrun was killed by signal 9",
    }
    assert said[victim, number] in run.logs
    assert [point.step for point in run.losses] == list(range(1, 241))
    assert run.mlflow.data.params["gpus"] == "2"
    _check_locks(platform)


def test_kill_9_of_the_flow(platform: Installation, submit: Callable[..., Run]) -> None:
    """Its ranks die with it, and the next run, on one process, goes on and says on how many it was before."""
    run, parameters = _begin(platform, submit, 104)
    gang = _gang(run)
    began = run.kill()
    _wait_for_the_end([*gang["torchrun"], *gang["ranks"]], began)
    run.wait_for_both("CRASHED", "KILLED", 45)
    wait_for("the slot", lambda: platform.api("/v2/concurrency_limits/tag:gpu")["active_slots"] == 0, 95)
    _check_locks(platform)
    step = _checkpoint(platform, 104)
    assert step >= 20
    again = submit({**parameters, "gpus": 1})
    again.wait_for_both("COMPLETED", "FINISHED", 300)
    assert f"this training was resumed at step {step}" in again.logs
    assert f"the checkpoint of step {step} is of a training on 2 ranks, and it goes on with 1" in again.logs
    assert [point.step for point in again.losses] == list(range(1, 241))


def test_cancellation_and_sigterm(platform: Installation, submit: Callable[..., Run]) -> None:
    """The ranks stop after the same step, with a checkpoint of it, and the next run goes on there."""
    steps = []
    for how, prefect in (("cancel", "CANCELLED"), ("SIGTERM", "CRASHED"), ("SIGTERM to all", "CRASHED")):
        run, parameters = _begin(platform, submit, 105, max([0, *steps]) + 50, max_steps=5000)
        gang = _gang(run)
        began = time.time()
        if how == "cancel":
            done = platform.command(str(BIN / "prefect"), "flow-run", "cancel", run.id)
            output, _ = done.communicate(timeout=60)
            assert done.returncode == 0, output
            began = time.time()
        elif how == "SIGTERM":
            began = run.kill(signal.SIGTERM)
        else:  # as `make down` does
            for pid in platform.descendants("PREFECT__FLOW_RUN_ID", run.id):
                os.kill(pid, signal.SIGTERM)
        _wait_for_the_end([*gang["torchrun"], *gang["ranks"]], began)
        run.wait_for_both(prefect, "KILLED", 60)
        step = _checkpoint(platform, 105)
        assert step == _steps(platform, 105)
        steps.append(step)
        _check_locks(platform)
    assert steps == sorted(set(steps))
    assert any(step % 20 for step in steps), "a checkpoint of the last step, and not of a validation"
    began = time.time() * 1000
    last = submit(parameters)
    wait_for("a later step", lambda: _steps(platform, 105) > steps[-1] + 5, 240)
    lines = map(json.loads, (platform.training(105) / "metrics.jsonl").read_text().splitlines()[:-1])
    assert next(line["step"] for line in lines if line["time"] > began) == steps[-1] + 1
    last.kill(signal.SIGTERM)
    last.wait_for_both("CRASHED", "KILLED", 60)


def test_the_doctor_finds_nothing(platform: Installation) -> None:
    """After all these tests nothing is wrong."""
    doctor = platform.command(str(BIN / "python"), "-m", "ops.recovery.doctor")
    output, _ = doctor.communicate(timeout=90)
    assert doctor.returncode == 0, output
