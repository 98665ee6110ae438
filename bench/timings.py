"""What the printed lines of a whole job say of its time: the pipeline's own table, and TRL's script's lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_START = "interpreter"  # from the start of the process until its first line runs
_AFTER = ("publish", "exit")  # the pipeline's steps after the evaluation
_PIPELINE_STEP = re.compile(r"(\w+) +(\d+\.\d+) +\d+\.\d%")
_TRL_STEP = re.compile(r" *(\d+\.\d) s  (.+)")


class SideError(ValueError):
    """A run of one side failed; the message says how."""


@dataclass(frozen=True)
class Line:
    """A line that a process printed.

    Attributes:
        seconds: seconds from the start of the process.
        text: the line without its end.
    """

    seconds: float
    text: str


@dataclass(frozen=True)
class Timing:
    """One run of one side.

    Attributes:
        steps: seconds of each step, in order, up to the evaluated model on disk.
        after: seconds of each later step.
    """

    steps: dict[str, float]
    after: dict[str, float]

    @property
    def seconds(self) -> float:
        """From the start of the process to the evaluated model."""
        return sum(self.steps.values())


def read_pipeline(status: int, lines: Sequence[Line]) -> Timing:
    """Read the table of times that ``python -m flows`` prints at its end.

    Raises:
        SideError: the table is missing, or the run failed.
    """
    begin = next((n for n, line in enumerate(lines) if re.match(r"time +seconds +share$", line.text)), None)
    if status or begin is None:
        raise SideError(_failure(status, lines))
    seconds: dict[str, float] = {}
    for line in lines[begin + 1 :]:
        if not (found := _PIPELINE_STEP.fullmatch(line.text)):
            break
        seconds[found[1]] = float(found[2])
    total = seconds.pop("total")
    seconds = {_START: lines[begin].seconds - total, **seconds, "exit": lines[-1].seconds - lines[begin].seconds}
    return Timing(
        {step: taken for step, taken in seconds.items() if step not in _AFTER},
        {step: taken for step, taken in seconds.items() if step in _AFTER},
    )


def read_trl(status: int, lines: Sequence[Line]) -> Timing:
    """Read the stages that the TRL script prints, each with the seconds since its start.

    Raises:
        SideError: the last stage is missing, or the run failed.
    """
    stages = [(line.seconds, float(m[1]), m[2]) for line in lines if (m := _TRL_STEP.fullmatch(line.text))]
    if status or not stages or stages[-1][2] != "saved":
        raise SideError(_failure(status, lines))
    steps = {_START: max(0.0, stages[-1][0] - stages[-1][1])}
    before = 0.0
    for _, end, stage in stages:
        steps[stage] = end - before
        before = end
    return Timing(steps, {"exit": lines[-1].seconds - stages[-1][0]})


def _failure(status: int, lines: Sequence[Line]) -> str:
    said = [line.text.strip() for line in lines if line.text.strip()]
    return f"ended with status {status} and without its times: {' | '.join(said[-5:])}"


READERS = {"pipeline": read_pipeline, "pipeline-used": read_pipeline, "trl": read_trl}
