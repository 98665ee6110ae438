"""Scaling: no two rows share a prompt, the cheapest of the tries counts, and one run of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scaling import COMPUTE, FILL, READ, TOKENISE, Cost, parse, summarise, table, write_numbered_rows

ROOT = Path(__file__).resolve().parents[2]


def test_rows_repeat_with_prompts_of_their_own(tmp_path: Path) -> None:
    """The requested number of rows, each usable one in turn, none from test, and the same ones each time."""
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)] + [{"prompt": "no answer"}]
    (source / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (source / "test.jsonl").write_text(json.dumps({"prompt": "kept out", "completion": "x"}))
    for name in ("once.jsonl", "again.jsonl"):
        write_numbered_rows(source, 8, tmp_path / name)
    written = [json.loads(line) for line in (tmp_path / "once.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in written}) == len(written) == 8
    pairs = [(row["prompt"].split("\n")[0], row["completion"]) for row in written]
    assert set(pairs) == {("p0", "c0"), ("p1", "c1"), ("p2", "c2")}
    assert pairs[:3] == pairs[3:6]
    assert (tmp_path / "once.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_cheapest_try_counts_and_most_memory() -> None:
    """Sizes are compared with the smallest size of the same stage."""
    costs = [
        Cost(TOKENISE, 1000, 100, 3e-4, 4e-4, None, 50, 5),
        Cost(TOKENISE, 4000, 400, 1e-3, 1e-3, None, 60, 6),
        Cost(TOKENISE, 1000, 100, 2e-4, 5e-4, None, 40, 4),
        Cost(READ, 1000, 10, 1.0, 2.0, 3.0, 2_500_000_000, None),
    ]
    small, large, other = summarise(costs)
    assert (small["stage"], small["rows"], large["rows"], other["stage"]) == (TOKENISE, 1000, 4000, READ)
    assert small["cpu_us_per_token"] == pytest.approx([3.0, 2.0])
    assert small["best_cpu_us_per_token"] == pytest.approx(2.0)
    assert small["best_us_per_token"] == pytest.approx(4.0)
    assert small["peak_memory_bytes"] == 50
    assert large["of_smallest"] == pytest.approx(1.25)
    assert other["of_smallest"] == 1.0
    assert table([small, large, other]).splitlines()[-1].split()[-3:] == ["200000.00", "3.0", "2.50"]


def test_sizes_that_cannot_be_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With a message, before anything runs."""
    for rows, message in (("1000,many", "are no whole numbers"), ("20,1000", "20: with less than 500")):
        with pytest.raises(SystemExit):
            parse(["--rows", rows])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run(tmp_path: Path) -> None:
    """All stages at two sizes; stages with a trunk file only up to --trunk-rows."""
    command = [sys.executable, "-m", "bench.scaling", "--rows", "500,600", "--trunk-rows", "500", "--steps", "3"]
    command += ["--tries", "1", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    stages = [(result["stage"], result["rows"]) for result in report["results"]]
    assert stages == [(TOKENISE, 500), (TOKENISE, 600), (COMPUTE, 500), (COMPUTE, 600), (FILL, 500), (READ, 500)]
    for result in report["results"]:
        assert result["tokens"] > 0
        assert result["best_cpu_us_per_token"] > 0
        assert result["best_us_per_token"] > 0
        assert 1e7 < result["peak_memory_bytes"] < 4e9
