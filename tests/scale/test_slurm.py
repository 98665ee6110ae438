"""The batch scripts of docs/slurm, as they stand, on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import installed
from made_up import BIN, FOREIGN, ROOT, free_ports, wait_for
from slurm import slurm

from model.engine.checkpoint import newest_step
from ops.machine.process import end_processes, tagged
from ops.tracking.connection import client as client_of

pytestmark = pytest.mark.slow
SCRIPTS = ROOT / "docs" / "slurm"
FEW_STEPS = ("eval_freq=2", "eval_rows=40", "sample_rows=1", "pass_rows=2", "max_new_tokens=4")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm(Path(folder)) as variables:
        yield variables


@pytest.fixture
def environment(cluster: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Of whoever submits a job: this interpreter, a data root, and no servers."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
        **cluster,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FINETUNE_DATA_ROOT": str(tmp_path / "root"),
        "FINETUNE_LOCKS": str(tmp_path / "locks"),
    }


def _submit(environment: dict[str, str], script: str, log: Path, *arguments: str, wait: bool = False) -> str:
    """sbatch in the checkout. Returns the id of the job; with ``wait`` the job has ended with status 0."""
    options = ["--parsable", f"--output={log}", *["--wait"] * wait]
    done = subprocess.run(
        ["sbatch", *options, str(SCRIPTS / script), *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + (log.read_text()[-3000:] if log.exists() else "")
    return done.stdout.split()[0]


def _jobs(environment: dict[str, str]) -> list[str]:
    shown = subprocess.run(["squeue", "-h", "-o", "%i"], env=environment, capture_output=True, text=True, check=True)
    return shown.stdout.split()


def test_a_training_is_stopped_and_resumed(environment: dict[str, str], tmp_path: Path) -> None:
    """scancel sends SIGTERM as the time limit does: a checkpoint is saved, and the same command goes on from it."""
    log = tmp_path / "first.log"
    long = [*FEW_STEPS[1:], "eval_freq=10000", "max_steps=14", "batch_size=512"]
    job = _submit(environment, "train.sbatch", log, "tiny", *long)
    wait_for("a step", lambda: re.search(r"step +[1-9]", log.read_text()) if log.exists() else None, 240)
    subprocess.run(["scancel", "--signal=TERM", job], env=environment, check=True)
    wait_for("the end of the job", lambda: job not in _jobs(environment), 60)
    _submit(environment, "train.sbatch", tmp_path / "second.log", "tiny", *long, wait=True)
    said = (tmp_path / "second.log").read_text()
    assert "this training was resumed at step" in said, said[-3000:]
    assert re.fullmatch(r"run: [0-9a-f]{32}", said.splitlines()[-1])


def test_two_machines_train_one_model(environment: dict[str, str], tmp_path: Path) -> None:
    """One task runs the flow, the other joins it; both nodes are this machine, so each gets locks of its own."""
    python = tmp_path / "python"
    own = f'FINETUNE_LOCKS="{tmp_path}/locks-$SLURMD_NODENAME" GLOO_SOCKET_IFNAME=lo'
    python.write_text(f'#!/bin/sh\n{own} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    log = tmp_path / "gang.log"
    few = [*FEW_STEPS, "device=cpu", "gpus=1", "max_steps=4"]
    _submit(environment | {"PYTHON": str(python)}, "gang.sbatch", log, "tiny", *few, wait=True)
    said = log.read_text()
    assert "machine 1 has found the flow run" in said
    assert "trains on cpu" in said
    assert "the flow run has ended" in said
    together = _losses(said)
    _submit(environment, "train.sbatch", tmp_path / "one.log", "tiny", *few, "seed=42", wait=True)
    assert len(together) == 3
    assert together == pytest.approx(_losses((tmp_path / "one.log").read_text()), abs=2e-4)


def test_slurm_starts_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    """One agent on each node, as docs/scale.md has it, with the job file of a flow run that was killed."""
    few = [*FEW_STEPS[1:], "eval_freq=10000", "device=cpu", "gpus=2", "max_steps=6", "batch_size=64"]
    with (tmp_path / "flow.log").open("wb") as log:
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows", "tiny", *few], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    (job,) = wait_for("the job file", lambda: list(tmp_path.glob("root/trainings/*/gang-0.json")), 240)
    flow.kill()
    flow.wait()
    end_processes(lambda: tagged("FINETUNE_DATA_ROOT", environment["FINETUNE_DATA_ROOT"]), 10)  # its server
    (port,) = free_ports(1)
    agents = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    done = subprocess.run(
        ["srun", "-N2", "--ntasks-per-node=1", str(BIN / "torchrun"), *agents, "--max-restarts=0",
         "-m", "tasks.rank_worker", str(job)],
        cwd=ROOT, env=environment | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert (job.parent / "step-00000006").is_dir(), done.stdout[-3000:]


def _losses(log: str) -> list[float]:
    """The validation losses in the log of a training."""
    return [float(found) for found in re.findall(r"step \d+/.* validation loss ([\d.]+)", log)]


@pytest.mark.parametrize("how", ["scancel", "--signal=TERM"])
def test_a_worker_takes_runs_for_the_time_of_its_job(environment: dict[str, str], tmp_path: Path, how: str) -> None:
    """It completes a run. scancel, or the signal before the time limit, ends it: the next run saves its last step."""
    (tmp_path / "servers").mkdir()
    with installed(tmp_path / "servers", worker=False) as servers:
        names = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_WORKER_QUERY_SECONDS", "PREFECT_HOME")
        client = environment | {name: servers.environment[name] for name in names}
        log = tmp_path / "worker.log"
        job = _submit(client, "worker.sbatch", log)
        try:
            said, _ = servers.run(*FEW_STEPS, "max_steps=3").communicate(timeout=400)
            assert "Completed" in said, said[-3000:] + log.read_text()[-3000:]
            long = servers.run(*FEW_STEPS[1:], "eval_freq=100000", "max_steps=100000", "epochs=1000", "batch_size=8")
            training = wait_for("a long training", lambda: _training(environment, 20), 240)
        finally:
            began = time.monotonic()
            subprocess.run(["scancel", *[how] * (how != "scancel"), job], env=environment, check=True)
        wait_for("the end of the job", lambda: job not in _jobs(environment), 90)
        print(f"the job has ended after {time.monotonic() - began:.1f} s")
        said, _ = long.communicate(timeout=60)
        assert "Crashed" in said, said[-3000:] + log.read_text()[-3000:]
        assert newest_step(training) == _steps(training) >= 20
        runs = client_of(servers.tracking).search_runs(["1"])
        assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED"]
        wait_for("the end of its processes", lambda: not servers.descendants("SLURM_JOB_ID", job), 10)


def _steps(training: Path) -> int:
    """The newest step in a training's journal."""
    return int(json.loads((training / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def _training(environment: dict[str, str], steps: int) -> Path | None:
    """The directory of a training that has done so many steps."""
    for journal in Path(environment["FINETUNE_DATA_ROOT"]).glob("trainings/*/metrics.jsonl"):
        if journal.read_text().count("train/loss") > steps:
            return journal.parent
    return None
