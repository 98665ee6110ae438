"""What ``finetune run`` shows: live on a terminal, plain lines where the output is a file or a pipe.

Nothing here imports torch, Prefect or MLflow: the first line appears before they are imported.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ops.display import Display, mark_of
from ops.mistakes import is_of_project
from ops.text import printable

if TYPE_CHECKING:
    from model.engine.trainer import StepReport

_ENDED_BY_SIGNAL = "Execution was aborted by"  # in Prefect's records, of three kinds
_ACTIVITY = re.compile(r"[a-z]+ing\b")  # how a line begins that says what goes on, such as "scoring 324 rows"
_TOLD_PHASES = 0.5  # seconds: a shorter phase is not worth a line; the table at the end has all


class PlainDisplay(Display):
    """Lines with the time of day, on stderr: stdout has the result."""

    def line(self, text: str, level: int = logging.INFO) -> None:
        word = f"{logging.getLevelName(level).lower()}: " if level >= logging.WARNING else ""
        self._write(f"{time.strftime('%H:%M:%S')} {word}{text}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        width = max(len(name) for name, _ in rows)
        self.line(title)
        for name, value in rows:
            self._write(f"  {name:<{width}}  {value}")

    def _write(self, line: str) -> None:
        """Not by print(), which Prefect turns into a log record while a flow runs."""
        with contextlib.suppress(OSError, ValueError):  # the reader of stderr has gone: the run goes on
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def phase(self, name: str, seconds: float) -> None:
        if seconds >= _TOLD_PHASES:
            self.line(f"{name}: {seconds:.1f} s")


class TerminalDisplay(Display):
    """A line for each event, and below the lines what goes on now: a spinner, or the bar of a training."""

    def __init__(self, console: Console):
        self.console = console
        self.lock = threading.Lock()  # a training reports from its own thread
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.progress.start()

    def line(self, text: str, level: int = logging.INFO) -> None:
        style = "bold red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else "dim"
        for each in text.splitlines():
            self.console.print(Text(printable(each)), style=style, soft_wrap=True)
        if level < logging.WARNING and _ACTIVITY.match(text):
            self._now(text.splitlines()[-1])

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        shown = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        for name, value in rows:
            shown.add_row(Text(name), Text(printable(value)))
        self.console.print(shown)

    def step(self, title: str, report: StepReport) -> None:
        facts = ""
        if report.step:
            left = "" if math.isnan(report.eta_seconds) else f"  {_clock(report.eta_seconds)} left"
            facts = f"loss {report.loss:.4f}  {report.tokens_per_second:,.0f} tokens/s{left}"
        name = f"{title}step {report.step}/{report.total_steps}"
        with self.lock:
            if self.task is not None:
                done = min(report.step, report.total_steps)
                self.progress.update(
                    self.task, description=name, completed=done, total=report.total_steps, facts=facts
                )
        if report.eval_loss is not None:
            self.console.print(Text(f"{name}  validation loss {report.eval_loss:.4f}"))

    def phase(self, name: str, seconds: float) -> None:
        if seconds >= _TOLD_PHASES:
            self.console.print(Text.assemble(("✓ ", "green"), name, (f"  {seconds:.1f} s", "dim")))
        self._now("...")

    def _now(self, text: str) -> None:
        """Show what goes on, of an unknown length."""
        with self.lock:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.task = self.progress.add_task(printable(text)[:60], total=None, facts="")

    def close(self) -> None:
        self.progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def open_display() -> Display:
    """A live display if stdout and stderr are terminals, else plain lines."""
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal and sys.stderr.isatty():
        return TerminalDisplay(console)
    return PlainDisplay()


class LogLines(logging.Handler):
    """Shows log records of a run as lines; Prefect's own reports of its engine's states are left out.

    What an interrupted training keeps is no line here, but the last line of the command.
    """

    def __init__(self, shown: Display):
        super().__init__()
        self.shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        mark = mark_of(record)
        live = isinstance(self.shown, TerminalDisplay)
        if mark == "shown" or (mark == "step" and live) or _is_chatter(record):
            return
        try:
            if mark == "kept":
                self.shown.kept = self.format(record)
            else:
                self.shown.line(self.format(record), record.levelno)
        except Exception:
            self.handleError(record)


def _is_chatter(record: logging.LogRecord) -> bool:
    """Whether a record is Prefect's own and no warning, or says that a signal ended the run: the command says that.

    What this project prints in a flow passes through Prefect.
    """
    if not record.name.startswith("prefect"):
        return False
    if record.levelno >= logging.WARNING:
        return _ENDED_BY_SIGNAL in record.getMessage()
    return not is_of_project(record.pathname) and record.funcName != "print_as_log"


def show_logs(shown: Display) -> None:
    """Show the log records of this process on a display, not by Prefect's handler. Prefect is imported before."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(LogLines(shown))
