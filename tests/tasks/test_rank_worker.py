"""Ranks that torchrun was told to start by hand, as a cluster's scheduler does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import wait_for
from world import World

pytestmark = pytest.mark.slow


def _torchrun(world: World, job: Path) -> subprocess.Popen[str]:
    world.processes["torchrun"] = process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc-per-node", "2", "--max-restarts", "0", "-m", "tasks.rank_worker", str(job),
        ],
        cwd=world.base, env=world.environment | {"GLOO_SOCKET_IFNAME": "lo"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return process


def test_ranks_started_by_hand_go_on_with_a_training(tmp_path: Path) -> None:
    """From a flow run's job file; SIGTERM stops them with a checkpoint, and a flow run publishes the end."""
    parameters = {"max_steps": 300, "epochs": 100, "eval_freq": 1000, "subset_count": 400}
    with World(tmp_path) as world:
        world.start_prefect()
        world.begin({**parameters, "gpus": 2})
        wait_for("ten steps", lambda: len(world.journal()) > 10, 240)
        world.kill("run")
        (job,) = (world.base / "data" / "trainings").glob("*/gang-0.json")
        by_hand = _torchrun(world, job)
        wait_for("fifty steps", lambda: len(world.journal()) > 50, 240)
        os.kill(by_hand.pid, signal.SIGTERM)
        output, _ = by_hand.communicate(timeout=60)
        assert 'rank 0: {"kind": "stopped", "text": "stopped on request after step ' in output
        stopped = max(int(path.name.removeprefix("step-")) for path in job.parent.glob("step-*"))
        assert stopped >= 50
        output, _ = _torchrun(world, job).communicate(timeout=240)
        assert "step 300/300, loss " in output, output[-3000:]
        output = world.run({**parameters, "gpus": 1})
        assert "this training was resumed at step 300" in output
        assert "Completed" in output.splitlines()[-1]
