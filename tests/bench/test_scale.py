"""The benchmark of several GPUs: medians, ratios to one, and one run of the command with processes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.scale import parse, summarise, table

ROOT = Path(__file__).resolve().parents[2]


def timing(world: int, batch_size: int, first: float, cached: float, **parts: float | None) -> dict[str, Any]:
    """A training as a worker writes it."""
    known = {"step_ms": 10.0, "slowest_step_ms": 20.0, "exchange_ms": None, "waiting_ms": None, **parts}
    return {"world": world, "batch_size": batch_size, "first_epoch": first, "cached_epochs": cached, **known}


def test_medians_are_compared_with_one_gpu() -> None:
    """Of the same batch size; without one GPU among the results there is no ratio."""
    timings = [
        *(timing(1, 128, 100.0, cached) for cached in (190.0, 200.0, 900.0)),
        *(timing(2, 128, first, 300.0, exchange_ms=1.0, waiting_ms=0.25) for first in (150.0, 140.0, 160.0)),
        timing(4, 512, 1.0, 1.0),
    ]
    one, two, other = summarise(timings)
    assert (one["cached_epochs"], one["cached_epochs_ratio"], one["trainings"]) == (200.0, 1.0, 3)
    assert (two["first_epoch_ratio"], two["cached_epochs_ratio"], two["exchange_ms"]) == (1.5, 1.5, 1.0)
    assert (other["first_epoch_ratio"], other["cached_epochs_ratio"]) == (None, None)
    lines = table([one, two, other]).splitlines()
    assert lines[2].split()[-4:] == ["1.00", "0.25", "1.50x", "1.50x"]


def test_options_that_cannot_be_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With a message, before anything runs."""
    for options, message in (
        (["--epochs", "1"], "2 are the fewest"),
        (["--gpus", "99"], "add --device cpu"),
        (["--gpus", "1", "1000", "--device", "cpu"], "--gpus 1000 is too many: on a CPU"),
    ):
        with pytest.raises(SystemExit):
            parse(options)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_on_a_cpu_are_measured(tmp_path: Path) -> None:
    """One and two ranks train the embedded rows; every line and the file have what was measured."""
    options = ["--device", "cpu", "--size", "tiny", "--rows", "32", "--batch-size", "16", "--epochs", "2"]
    command = [sys.executable, "-m", "bench.scale", *options, "--gpus", "2", "1", "--quick", "--profile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "scale.json"
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [training["world"] for training in report["trainings"]] == [1, 2]
    assert "2 ranks, 16 rows, training 0: first epoch" in done.stdout
    one, two = report["results"]
    assert one["exchange_ms"] is None
    assert two["exchange_ms"] > 0
    for result in (one, two):
        assert min(result["first_epoch"], result["cached_epochs"], result["step_ms"]) > 0
        assert result["cached_epochs_ratio"] == pytest.approx(result["cached_epochs"] / one["cached_epochs"])
    assert done.stdout.splitlines()[-1].split()[:2] == ["16", "2"]
