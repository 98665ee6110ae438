"""What is said of measurements: a table with the engine's weak points first, and a table of speed against memory."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.comparison import compare, record, table
from bench.measure import Job, Measurement, Setting, Window
from bench.memory import memory_settings, memory_table
from bench.options import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(token_dir: Path, tokenizer_dir: Path) -> Job:
    """A small job on the test rows."""
    return Job(token_dir, tokenizer_dir, "tiny", 2, 8, "cpu", "fp32", warm_up=1, steps=4, epochs=2)


def entry(
    job: Job, contestant: str, text: str, seconds: float, phase: str = "steady", gigabytes: float = 1
) -> dict[str, Any]:
    """A result of 100 tokens in some seconds."""
    measurement = Measurement(phase, [Window(seconds, 100, 50)], 1.0, "fp32", "0.1 in trained blocks")
    return record(Setting(contestant, text, print), measurement, int(gigabytes * 2**30), job, ceiling=1e12)


def test_failures_are_reported_and_never_compared(job: Job) -> None:
    """A failed setting has a line with its error; the fastest setting of each contestant has a star."""
    results = [
        entry(job, "engine", "as it comes", 1.0, "first epoch"),
        entry(job, "engine", "as it comes", 0.5, "later epochs"),
        entry(job, "engine", "in small passes", 2.0, "every epoch"),
        entry(job, "hf", "slow", 4.0),
        entry(job, "hf", "fast", 2.0),
        {"contestant": "trl", "settings": "greedy", "error": "out of memory"},
    ]
    compare(results)
    assert [result["best"] for result in results] == [True, True, True, False, True, False]
    assert results[4]["engine_first_epoch_over_this"] == 2.0
    assert results[4]["engine_later_epochs_over_this"] == 4.0
    assert results[0]["necessary_flops_per_token"] > results[1]["necessary_flops_per_token"]
    lines = table(results).splitlines()
    assert lines[-3:] == [
        "trl, greedy: out of memory",
        "Faster than the engine in its first or later epochs: none.",
        "Less memory than the engine's 1.00 GiB: none",
    ]
    assert [line.split()[:2] for line in lines[1:-3]][-1] == ["hf", "*"]
    assert all("fp32" in line and "0.1 in trained blocks" in line for line in lines[1:-3])


def test_what_the_engine_is_behind_in_comes_first(job: Job) -> None:
    """Faster settings are at the top, the fastest first, also if only the first epoch is slower; then less memory."""
    results = [
        entry(job, "engine", "as it comes", 1.0, "first epoch", gigabytes=4),
        entry(job, "engine", "as it comes", 0.5, "later epochs", gigabytes=4),
        entry(job, "engine", "in small passes", 0.1, "every epoch", gigabytes=2),
        entry(job, "hf", "slow", 4.0, gigabytes=1.5),
        entry(job, "hf", "faster in one epoch", 0.8, gigabytes=9),
        entry(job, "trl", "fast", 0.4, gigabytes=3),
    ]
    compare(results)
    assert [result.get("engine_is_behind") for result in results] == [
        None,
        None,
        None,
        [],
        ["first epoch"],
        ["first epoch", "later epochs"],
    ]
    lines = table(results).splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["trl *", "hf *", "engine, first epoch *"]
    assert lines[-4:] == [
        "Faster than the engine in its first or later epochs: the first 2 lines.",
        "Less memory than the engine's 4.00 GiB: 2 settings",
        "- 1.50 GiB: hf, slow",
        "- 3.00 GiB: trl, fast",
    ]


def test_nothing_is_said_of_an_engine_that_failed(job: Job) -> None:
    """Another setting of the engine does not stand in for it as it comes."""
    results = [
        {"contestant": "engine", "settings": "as it comes", "error": "out of memory"},
        entry(job, "engine", "in small passes", 0.1, "every epoch"),
        entry(job, "hf", "fast", 2.0),
    ]
    compare(results)
    assert results[2]["engine_is_behind"] == []
    assert not any("over_this" in name for name in results[2])
    assert "than the engine" not in table(results)


# Speed against memory


def test_memory_settings_are_all_combinations() -> None:
    """The engine as it comes is first; then its own passes and those given, with each size of the trunk's outputs."""
    first, *others = memory_settings([4096, 1024], [32, 0.5])
    assert (first.text, first.options) == ("as it comes", {})
    found = [(setting.options["micro_batch_tokens"], setting.options["trunk_cache_bytes"]) for setting in others]
    assert found == [(tokens, size) for size in (32 * 10**9, 5 * 10**8) for tokens in (None, 4096, 1024)]
    assert others[4].text == "micro_batch_tokens 4,096, trunk_cache_gb 0.5"
    options = parse(["--memory-table", "--device", "cpu"])
    assert options.peers == ["engine"]
    assert (options.micro_batch_tokens, options.trunk_cache_gb) == ([1024, 512], [32.0, 0.0])


def test_memory_table(job: Job) -> None:
    """One line for each setting, the least memory first; a setting with one phase has one speed."""
    results = [
        entry(job, "engine", "as it comes", 1.0, "first epoch", gigabytes=4),
        entry(job, "engine", "as it comes", 0.5, "later epochs", gigabytes=4),
        entry(job, "engine", "in small passes", 2.0, "every epoch", gigabytes=2),
        {"contestant": "engine", "settings": "greedy", "error": "out of memory"},
    ]
    lines = [line.split() for line in memory_table(results).splitlines()]
    assert lines[1][-3:] == ["50", "50", "2.00"]
    assert lines[2][-3:] == ["100", "200", "4.00"]
    assert lines[3] == ["engine,", "greedy:", "out", "of", "memory"]


@pytest.mark.slow
def test_a_run_for_the_memory_table(tmp_path: Path) -> None:
    """The command as users run it: one line and one record of finite numbers for each combination."""
    command = [sys.executable, "-m", "bench.train", "--device", "cpu", "--memory-table", "--precision", "fp32"]
    command += ["--steps", "2", "--batch-size", "2", "--rows", "12", "--epochs", "2"]
    command += ["--micro-batch-tokens", "128", "--trunk-cache-gb", "1,0", "--out", str(tmp_path / "report.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    kept, computed = ["first epoch", "later epochs"], ["every epoch"]
    phases: dict[str, list[str]] = {}
    for result in results:
        phases.setdefault(result["settings"], []).append(result["phase"])
        assert math.isfinite(result["useful_tokens_per_second"])
        assert result["useful_tokens_per_second"] > 0
    assert phases == {
        "as it comes": kept,
        "micro_batch_tokens null, trunk_cache_gb 1": kept,
        "micro_batch_tokens 128, trunk_cache_gb 1": kept,
        "micro_batch_tokens null, trunk_cache_gb 0": computed,
        "micro_batch_tokens 128, trunk_cache_gb 0": computed,
    }
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("contestant"))
    assert sorted(re.split(" {2,}", line)[1] for line in lines[start + 1 : start + 6]) == sorted(phases)
