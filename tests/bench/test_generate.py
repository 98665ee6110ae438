"""bench.generate: the comparison, and one run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.generate import compare, table

ROOT = Path(__file__).resolve().parents[2]


def entry(contestant: str, settings: str, speed: float) -> dict[str, Any]:
    told = {"contestant": contestant, "settings": settings, "new_tokens_per_second": speed}
    return {**told, "peak_memory_bytes": 2**31, "first_call_seconds": 1.5}


def test_each_result_is_compared_with_this_project() -> None:
    """Also where it is slower; a star marks each contestant's fastest setting, and failures are shown."""
    failed = {"contestant": "transformers", "settings": "static", "error": "out of memory"}
    results = [entry("generate", "as it comes", 100), entry("transformers", "dynamic", 50), failed]
    results += [entry("transformers", "huge", 400)]
    compare(results)
    assert [result.get("generate_over_this") for result in results] == [1.0, 2.0, None, 0.25]
    assert [result.get("best") for result in results] == [True, False, None, True]
    lines = table(results).splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["*", "dynamic", "*"]
    assert lines[-1] == "transformers, static: out of memory"


@pytest.mark.parametrize("temperature", [pytest.param("0", marks=pytest.mark.slow), "0.8"])
def test_the_command_measures_all_contestants(tmp_path: Path, temperature: str) -> None:
    """On the embedded rows: all produce the same number of tokens; table and JSON have both."""
    out = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "bench.generate", "--device", "cpu", "--size", "tiny", "--prompts", "6",
        "--new-tokens", "4", "--repeats", "1", "--precision", "fp32", "--processor-time", "--batch-sizes", "3",
        "--temperature", temperature, "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert [result["contestant"] for result in report["results"]] == ["generate", "transformers"]
    for result in report["results"]:
        assert "error" not in result, result
        assert [call["new_tokens"] for call in result["calls"]] == [24]
        assert result["new_tokens_per_second"] > 0
    assert report["data"]["prompts"] == 6


def test_too_few_prompts_are_named() -> None:
    command = [sys.executable, "-m", "bench.generate", "--device", "cpu", "--size", "tiny", "--prompts", "999999"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "prompts that fit the context, not 999999" in done.stderr
