"""The progress of a training in a log."""

from __future__ import annotations

import math
import time
from typing import Any

from model.engine.trainer import StepReport
from ops.display import STEP, display

_LOG_SECONDS = 10.0


class ProgressLines:
    """Log lines of one training, or of several in turn, one at most every ten seconds."""

    def __init__(self, log: Any):
        self.log = log
        self.last_line = -math.inf
        self.title, self.part, self.parts = "", 0, 1

    def begin_part(self, title: str, part: int, parts: int) -> None:
        """Show one of several trainings from now on.

        Args:
            title: begins its lines.
            part: its number, from 0.
            parts: number of all trainings.
        """
        self.title, self.part, self.parts = f"{title}: ", part, parts
        self.last_line = -math.inf

    def show(self, report: StepReport) -> None:
        """Show a step, and log it unless the last line is too young; validations are always logged."""
        display().step(self.title, report)
        now = time.monotonic()
        if report.eval_loss is None and now - self.last_line < _LOG_SECONDS:
            return
        self.last_line = now
        parts = [f"step {report.step}/{report.total_steps}"]
        if report.step:
            parts += [f"loss {report.loss:.4f}", f"{report.tokens_per_second:,.0f} tokens/s"]
            parts += [f"{report.eta_seconds:.0f} s to go"]
        if report.eval_loss is not None:
            parts.append(f"validation loss {report.eval_loss:.4f}")
        line = self.title + ", ".join(parts)
        self.log.info(line, extra=STEP)
        done = self.part + report.step / max(1, report.total_steps)
        self.on_line(100 * done / self.parts, line)

    def on_line(self, percent: float, line: str) -> None:
        """Called with each line that was logged."""
