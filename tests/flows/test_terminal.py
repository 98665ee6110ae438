"""What a run shows, live on a terminal and as plain lines."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from terminals import plain, run_at_terminal

from flows.terminal import LogLines, PlainDisplay, TerminalDisplay, open_display
from model.engine.trainer import StepReport
from ops.display import KEPT, SHOWN, STEP

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["max_steps=12", "eval_freq=6", "eval_rows=40", "sample_rows=2", "pass_rows=2", "max_new_tokens=8"]
REPORT = StepReport(step=30, total_steps=40, loss=0.5, tokens_per_second=12345.6, eta_seconds=75.4, eval_loss=None)
VALIDATION = StepReport(30, 40, 0.5, 12345.6, 75.4, 1.25)


def _record(message: str, path: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("prefect.flow_runs", level, path, 1, message, (), None)
    record.__dict__.update(extra)
    return record


@pytest.fixture
def terminal() -> tuple[TerminalDisplay, io.StringIO]:
    """A display on a terminal that is recorded."""
    stream = io.StringIO()
    return TerminalDisplay(Console(file=stream, force_terminal=True, width=100, legacy_windows=False)), stream


def test_a_training_on_a_terminal(terminal: tuple[TerminalDisplay, io.StringIO]) -> None:
    """A bar with loss, tokens/s and time left, a line for each validation, and seconds of a phase."""
    shown, stream = terminal
    shown.phase("prepare", 2.34)
    shown.step("", REPORT)
    shown.progress.refresh()
    shown.step("", VALIDATION)
    shown.phase("wait", 0.01)
    shown.close()
    text = plain(stream.getvalue())
    assert "✓ prepare  2.3 s" in text
    assert re.search(r"step 30/40 [━╸╺]+ loss 0\.5000  12,346 tokens/s  1:15 left", text)
    assert "step 30/40  validation loss 1.2500" in text
    assert "wait" not in text, "shorter than anybody could read"
    shown.step("", StepReport(0, 40, math.nan, 0.0, math.nan, None))


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, with the time of day and no escape sequence."""
    shown = open_display()
    assert isinstance(shown, PlainDisplay)
    shown.table("plan", [("rows", "3"), ("device", "cpu")])
    shown.line("careful", logging.WARNING)
    shown.phase("train", 12.34)
    shown.step("", VALIDATION)
    output = capsys.readouterr()
    assert output.out == ""
    expected = r"T plan\n  rows    3\n  device  cpu\nT warning: careful\nT train: 12\.3 s\n"
    assert re.fullmatch(expected.replace("T", r"\d\d:\d\d:\d\d"), output.err)


def test_records_that_are_shown(
    terminal: tuple[TerminalDisplay, io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    """This project's, prints in a flow, and all warnings; not Prefect's own, nor what has another form."""
    own, prefect = str(ROOT / "tasks" / "x.py"), "/site-packages/prefect/flow_engine.py"
    records = [
        _record("ours", own),
        _record("printed", "/site-packages/prefect/logging/loggers.py", funcName="print_as_log"),
        _record("Beginning flow run", prefect),
        _record("Prefect warns", prefect, logging.WARNING),
        _record("a table", own, **SHOWN),
        _record("step 3/4", own, **STEP),
        _record("Crash detected! Execution was aborted by an interrupt signal.", prefect, logging.ERROR),
        _record("Crash detected! Request to the server failed.", prefect, logging.ERROR),
        _record("stopped: a checkpoint is kept", own, logging.WARNING, **KEPT),
    ]
    live, stream = terminal
    lines = PlainDisplay()
    for record in records:
        LogLines(live).handle(record)
        LogLines(lines).handle(record)
    live.close()
    assert live.kept == lines.kept == "stopped: a checkpoint is kept"
    written, text = capsys.readouterr().err, plain(stream.getvalue())
    assert [line[9:] for line in written.splitlines()] == [
        "ours", "printed", "warning: Prefect warns", "step 3/4",
        "error: Crash detected! Request to the server failed.",
    ]  # fmt: skip
    for message, expected in (("ours", True), ("Prefect warns", True), ("Beginning", False), ("step 3/4", False)):
        assert (message in text) == expected
    assert "a table" not in text
    assert "aborted" not in written + text, "the command says it, in its last line"
    assert "is kept" not in written + text


def test_what_goes_on_is_an_activity(terminal: tuple[TerminalDisplay, io.StringIO]) -> None:
    """The spinner shows what a line says that begins with it; a result is a line only."""
    shown, _ = terminal
    shown.line("scoring 324 rows of the test split")
    shown.line("commonest reasons of failure: 9 x an assertion failed")
    assert [task.description for task in shown.progress.tasks] == ["scoring 324 rows of the test split"]
    shown.phase("evaluate", 18.2)
    assert [task.description for task in shown.progress.tasks] == ["..."]
    shown.close()


def test_a_line_moves_no_cursor(terminal: tuple[TerminalDisplay, io.StringIO]) -> None:
    """Whatever is in the name of a file."""
    shown, stream = terminal
    shown.line("rows \x1b[2J.jsonl [bold]x[/bold]")
    shown.close()
    assert "rows \\x1b[2J.jsonl [bold]x[/bold]" in plain(stream.getvalue())


@pytest.mark.slow
def test_a_run_at_a_terminal(tmp_path: Path) -> None:
    """From the first line, before anything slow is imported, to the scores; Prefect's chatter is left out."""
    environment = {**os.environ, "FINETUNE_DATA_ROOT": str(tmp_path), "FINETUNE_LOCKS": str(tmp_path / "device")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    done = run_at_terminal([sys.executable, "-m", "flows", "run", *SHORT], ROOT, environment)
    print(f"first output after {done.first:.1f} s")
    text = plain(done.text)
    assert done.status == 0, text[-3000:]
    assert text.lstrip().startswith("importing torch and Prefect")
    for expected in (
        r"│ rows   │ 3,426 train, 174 validation, 324 test",
        r"step \d+/12 [━╸╺]+ loss \d\.\d{4}  [\d,]+ tokens/s  \d+:\d\d left",
        r"step 6/12  validation loss \d\.\d{4}",
        r"✓ train  \d+\.\d s",
        r"✓ evaluate  \d+\.\d s",
        r"frozen blocks' outputs kept in a file: \d\.\d\d GB",
        r"test loss +2\.4038",
        r"  tuned:",
        r"run: [0-9a-f]{32}",
    ):
        assert re.search(expected, text), expected
    assert "Beginning flow run" not in text
    assert "Finished in state" not in text


@pytest.mark.slow
def test_verbose_shows_prefect_s_log(tmp_path: Path) -> None:
    """Without a terminal: no escape sequence in either case."""
    environment = {**os.environ, "FINETUNE_DATA_ROOT": str(tmp_path), "FINETUNE_LOCKS": str(tmp_path / "device")}
    words = [sys.executable, "-m", "flows", "run", "--verbose", *SHORT]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Beginning flow run" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
