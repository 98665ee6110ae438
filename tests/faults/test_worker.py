"""The end of a worker by a signal: its flow runs end first, each with a checkpoint of its last step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import LONG, SHORT, Run
from installation import Installation

from model.engine.checkpoint import newest_step

pytestmark = pytest.mark.slow


def _last_step(training: Path) -> int:
    return int(json.loads((training / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def _start_worker(platform: Installation) -> subprocess.Popen[bytes]:
    """The worker of containers and of Slurm's jobs, instead of Prefect's own."""
    if "worker" in platform.processes:
        platform.kill("worker")
    platform.start("worker", "python", "-m", "ops.stack.worker")
    return platform.processes["worker"]


@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_a_worker_saves_the_last_step(
    platform: Installation, submit: Callable[..., Run], to_all: bool
) -> None:
    """To the worker alone, as of a container, or to all processes, as Slurm sends it; all is over within 30 s."""
    worker = _start_worker(platform)
    seed = 201 + to_all
    run = submit({**LONG, "seed": seed})
    run.wait_until_it_trains()
    processes = platform.descendants("PREFECT__FLOW_RUN_ID", run.id) if to_all else []
    began = time.time()
    for pid in (worker.pid, *processes):
        os.kill(pid, signal.SIGTERM)
    assert worker.wait(30) == 0
    print(f"the worker has ended after {time.time() - began:.1f} s")
    assert run.both == ("CRASHED", "KILLED")
    step = newest_step(platform.training(seed))
    assert 0 < step == _last_step(platform.training(seed))
    assert not platform.descendants("PREFECT__FLOW_RUN_ID", run.id)


def test_a_worker_that_was_asked_to_end_takes_no_run(platform: Installation, submit: Callable[..., Run]) -> None:
    """A run that is due meanwhile waits for the next worker. An idle worker ends at once."""
    worker = _start_worker(platform)
    first = submit({**LONG, "seed": 203})
    first.wait_until_it_trains()
    os.kill(first.process.pid, signal.SIGSTOP)
    worker.terminate()
    second = submit({**SHORT, "max_steps": 3, "eval_freq": 2, "seed": 204})
    time.sleep(4)
    assert worker.poll() is None
    assert second.state["type"] == "SCHEDULED"
    os.kill(first.process.pid, signal.SIGCONT)
    assert worker.wait(30) == 0
    assert first.both == ("CRASHED", "KILLED")
    idle = _start_worker(platform)
    second.wait_for_both("COMPLETED", "FINISHED", 200)
    idle.send_signal(signal.SIGINT)
    assert idle.wait(10) == 0


def test_a_second_signal_kills_the_runs(platform: Installation, submit: Callable[..., Run]) -> None:
    """Their states are right all the same."""
    worker = _start_worker(platform)
    run = submit({**LONG, "seed": 205})
    run.wait_until_it_trains()
    os.kill(run.process.pid, signal.SIGSTOP)
    worker.terminate()
    time.sleep(2)
    worker.terminate()
    assert worker.wait(30) == 0
    assert run.both == ("CRASHED", "KILLED")
