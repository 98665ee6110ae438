"""kill -9 of a whole run in the middle of training, and what the next run makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.files import sha256_file
from ops.tracking.connection import client

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "flows", "max_steps=60", "eval_freq=10", "sample_rows=1", "max_new_tokens=4"]


def _start(data_root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        cwd=ROOT,
        env={**os.environ, "FINETUNE_DATA_ROOT": str(data_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The tracking URI and run id of a run that is left in peace."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    *_, tracking, run = output.splitlines()
    return tracking.removeprefix("tracking: "), run.removeprefix("run: ")


def _curves(tracking: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    mlflow = client(tracking)
    names = ("train/loss", "train/lr", "train/grad_norm", "eval/loss")
    return {name: [(m.step, m.value) for m in mlflow.get_metric_history(run_id, name)] for name in names}


def _model_hash(tracking: str, version: str = "1") -> str:
    import mlflow

    client(tracking)
    return sha256_file(
        Path(mlflow.artifacts.download_artifacts(f"models:/gpt2-code-tiny/{version}/model.safetensors"))
    )


@pytest.mark.slow
def test_a_killed_run_is_taken_over_bitwise(tmp_path: Path) -> None:
    """The second run takes the training over; curves and weights equal an uninterrupted run's, bit for bit."""
    whole = _start(tmp_path / "whole")
    expected = _finish(whole)

    killed = _start(tmp_path / "killed")
    deadline = time.monotonic() + 240
    try:
        while True:
            assert time.monotonic() < deadline
            assert killed.poll() is None
            journals = list((tmp_path / "killed" / "trainings").glob("*/metrics.jsonl"))
            if journals and journals[0].read_bytes().count(b"train/loss") >= 25:
                break
            time.sleep(0.02)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        # Its temporary server, in a session of its own, would keep the pipe open; the next run ends it.
        assert killed.stdout is not None
        killed.stdout.close()
    resumed = _start(tmp_path / "killed")
    output_uri, run_id = _finish(resumed)

    assert _curves(output_uri, run_id) == _curves(*expected)
    assert _model_hash(output_uri) == _model_hash(expected[0])
    # The killed run computed more than its last checkpoint held, and the resumed one did not start anew.
    runs = client(output_uri).search_runs([client(output_uri).get_run(run_id).info.experiment_id])
    assert len(runs) == 2
    speeds = client(output_uri).get_metric_history(run_id, "train/tokens_per_second")
    assert len(speeds) == 60
    assert speeds[19].timestamp < client(output_uri).get_run(run_id).info.start_time < speeds[20].timestamp
