"""The whole fine-tuning compared with TRL's: the inputs of both sides, and how their times are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.end_to_end import parse, run_timed, table, write_rows
from bench.timings import Line, read_pipeline, read_trl
from flows.summary import time_table
from model.data.rows import prompt_key


def test_pipeline_times_add_up() -> None:
    """The pipeline's table is read, with the time before and after it; publish and exit are separate."""
    seconds = {"imports": 2.0, "prefect": 3.5, "train": 10.25, "evaluate": 1.5, "publish": 0.75}
    printed = ["step 1/2", *time_table(seconds).splitlines(), "tracking: sqlite"]
    lines = [*(Line(18.5, text) for text in printed), Line(19.25, "")]
    timing = read_pipeline(0, lines)
    assert timing.steps == {"interpreter": 0.5, "imports": 2.0, "prefect": 3.5, "train": 10.25, "evaluate": 1.5}
    assert timing.after == {"publish": 0.75, "exit": 0.75}
    assert timing.seconds == 17.75


def test_trl_times_add_up() -> None:
    """Stages have the time since the start; a step takes the time between two stages."""
    printed = ["     4.0 s  imports", "{'loss': 1.0}", "    10.5 s  3 epochs, 9 steps", "    12.0 s  saved"]
    lines = [*(Line(12.25, text) for text in printed), Line(13.0, "")]
    timing = read_trl(0, lines)
    assert timing.steps == {"interpreter": 0.25, "imports": 4.0, "3 epochs, 9 steps": 6.5, "saved": 1.5}
    assert timing.after == {"exit": 0.75}


@pytest.mark.parametrize("reader", [read_pipeline, read_trl])
def test_a_failed_run_has_no_time(reader: Any) -> None:
    """A bad exit status or a missing table is an error that quotes the last lines."""
    whole = [Line(1.0, text) for text in [*time_table({"train": 1.0}).splitlines(), "     1.0 s  saved"]]
    reader(0, whole)
    for status, lines in ((1, whole), (0, [Line(1.0, "out of memory"), Line(2.0, "")])):
        with pytest.raises(ValueError, match=f"ended with status {status}.*(saved|out of memory)"):
            reader(status, lines)


def test_both_get_the_same_rows(tmp_path: Path, make_rows: Any, write_jsonl: Any, tokenizer: Any) -> None:
    """Training rows are repeated up to the requested number, and share no prompt with the held-out splits."""
    source = write_jsonl(tmp_path / "source" / "train.jsonl", [*make_rows(300), {"prompt": "no completion"}]).parent
    write_jsonl(source / "test.jsonl", make_rows(10))
    write_rows(source, tokenizer, 700, tmp_path)
    rows = {
        split: [json.loads(line) for line in (tmp_path / "rows" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    prompts = {split: {prompt_key(row["prompt"]) for row in part} for split, part in rows.items()}
    assert len(rows["train"]) == 700
    assert len(rows["test"]) == 10
    assert rows["validation"]
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values())) == 300
    once = len(prompts["train"])
    assert rows["train"][once : 2 * once] == rows["train"][:once]


def test_lines_bear_their_time(tmp_path: Path) -> None:
    """Lines of both streams come in order; the last one is the end of the process."""
    program = (
        "import sys, time; print('one', flush=True); time.sleep(0.5); print('two', file=sys.stderr); sys.exit(3)"
    )
    status, lines = run_timed([sys.executable, "-c", program], {}, timeout=60)
    assert status == 3
    assert [line.text for line in lines] == ["one", "two", ""]
    assert lines[1].seconds - lines[0].seconds >= 0.4
    status, lines = run_timed([sys.executable, "-c", "import time; time.sleep(60)"], {}, timeout=1)
    assert status < 0
    assert lines[-1].seconds < 30


def test_table_shows_the_fastest_run() -> None:
    """Shares are of the time to the evaluated model; a side that failed has its error."""
    runs = [
        {"seconds": 4.0, "steps": {"imports": 1.0, "train": 3.0}, "after": {"publish": 2.0}},
        {"seconds": 8.0, "steps": {"imports": 1.0, "train": 7.0}, "after": {"publish": 2.0}},
    ]
    lines = table({"pipeline": {"runs": runs}, "trl": {"runs": [], "error": "no module"}}).splitlines()
    assert [line.split() for line in lines if "train" in line] == [["train", "3.0", "75.0%"]]
    assert "trl: no module" in lines


def test_command_line_refuses_unknown_sides(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown side is an error."""
    with pytest.raises(SystemExit):
        parse(["--data", "rows", "--tokenizer", "gpt2", "--sides", "other"])
    assert "other is none of pipeline, pipeline-used, trl" in capsys.readouterr().err
