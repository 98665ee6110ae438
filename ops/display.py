"""What a run shows to the person who started it. In a worker and in tests nobody looks, and nothing is shown.

The command line sets a display (flows/terminal.py). Log records may carry a mark, as ``extra``, that it heeds:
``SHOWN`` for what the display has shown in its own form, ``STEP`` for the line of a training step, ``KEPT`` for what
an interrupted training keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.engine.trainer import StepReport

SHOWN = {"finetune_mark": "shown"}
STEP = {"finetune_mark": "step"}
KEPT = {"finetune_mark": "kept"}


def mark_of(record: logging.LogRecord) -> str:
    """The mark of a log record; empty without one."""
    return str(getattr(record, "finetune_mark", ""))


class Display:
    """Shows nothing.

    Attributes:
        kept: what an interrupted run keeps, for its last line; empty if it has not said so.
    """

    kept = ""

    def line(self, text: str, level: int = logging.INFO) -> None:
        """A line of text; warnings stand out."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of names and values."""

    def step(self, title: str, report: StepReport) -> None:
        """A step of a training was done; ``title`` names the training where there are several."""

    def phase(self, name: str, seconds: float) -> None:
        """A part of the run has ended."""

    def close(self) -> None:
        """Nothing more will be shown."""


_current = [Display()]


def display() -> Display:
    """The display of this process."""
    return _current[-1]


def show_on(shown: Display) -> None:
    """Use a display from now on."""
    _current[:] = [shown]
