"""What all contestants share: the job, the windows over which speed is measured, and the measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from model.net.config import GPTConfig
from model.net.device import resolve_precision

FIRST_EPOCH, LATER_EPOCHS = "first epoch", "later epochs"  # phases of the engine when it keeps the trunk's outputs
WINDOWS = 4  # per measurement, if there are enough steps
_TOGETHER = 1e-3  # seconds: reports that follow one another faster belong to one burst

# dtype of frozen weights, and of the inputs of matrix products. TF32 rounds the inputs of fp32 products.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
Precision = Literal["bf16", "fp16", "fp32", "tf32"]


@dataclass(frozen=True)
class Job:
    """The training that every contestant does.

    Attributes:
        tokens: directory written by ``model.data.preparing.prepare``.
        tokenizer: directory of its tokenizer; contestants read only the special tokens from it.
        model_size: preset whose shape the random weights have.
        num_unfrozen_layers: number of top blocks that train; the final norm trains too, everything else is frozen.
        batch_size: rows per optimizer step.
        device: cpu or cuda.
        precision: bf16, fp16, fp32 or tf32; every contestant computes in it, except in its default settings.
        warm_up: optimizer steps ahead of the first window.
        steps: optimizer steps measured.
        epochs: epochs of the engine, whose first epoch is measured apart from the others.
        processor_time: measure the processor time of one thread instead of wall-clock time.
        dropout: rate in the blocks that train, after attention's softmax, its projection and the MLP. Peers run with
            it in the same places, except in their default settings.
    """

    tokens: Path
    tokenizer: Path
    model_size: str
    num_unfrozen_layers: int
    batch_size: int
    device: str
    precision: Precision
    warm_up: int
    steps: int
    epochs: int
    processor_time: bool = False
    dropout: float = 0.0

    @property
    def config(self) -> GPTConfig:
        """Shape of the model."""
        return GPTConfig.preset(self.model_size)


def resolved_name(precision: str, device: torch.device) -> Precision:
    """The precision that ``auto`` chooses on the device; any other precision is returned as it is.

    Raises:
        ValueError: the precision has no name here.
    """
    if precision == "auto":
        dtype = resolve_precision("auto", device)
        precision = next((name for name, value in DTYPES.items() if value == dtype), str(dtype))
    for name in get_args(Precision):
        if name == precision:
            return name
    raise ValueError(f"precision {precision!r} is none of {', '.join(DTYPES)}")


def describe_dropout(rate: float) -> str:
    """Text for a dropout rate that acts where the job says."""
    return f"{rate:g} in trained blocks" if rate else "none"


@dataclass(frozen=True)
class Window:
    """A stretch of training between two readings of the clock.

    Attributes:
        seconds: between the two readings; the device is idle at both.
        tokens: real tokens trained on, without padding.
        targets: those tokens that bear loss.
    """

    seconds: float
    tokens: int
    targets: int


@dataclass(frozen=True)
class Measurement:
    """Result of one run of a contestant in one phase.

    Attributes:
        phase: part of the training; "steady" for contestants whose epochs are all alike.
        windows: windows in order, without the warm-up.
        seconds_to_first_step: seconds to the end of the first step, with weights on the device and rows tokenised at
            the start.
        precision: bf16, fp16, fp32 or tf32.
        dropout: rate and places of the dropout that the contestant ran with.
    """

    phase: str
    windows: list[Window]
    seconds_to_first_step: float
    precision: Precision
    dropout: str

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens per second: the median of the windows, but the mean in the first epoch of the engine.

        In that epoch the engine computes the trunk for the rows of several steps at once, so windows are not alike.
        """
        if self.phase == FIRST_EPOCH:
            return sum(window.tokens for window in self.windows) / sum(window.seconds for window in self.windows)
        return statistics.median(window.tokens / window.seconds for window in self.windows)

    @property
    def target_share(self) -> float:
        """Share of the tokens that bear loss."""
        return sum(window.targets for window in self.windows) / sum(window.tokens for window in self.windows)


@dataclass(frozen=True)
class Setting:
    """One way to run a contestant.

    Attributes:
        contestant: name of the contestant.
        text: description of the setting.
        run: function that measures; called with the job and ``options`` in a process of its own.
        options: keyword arguments of ``run``.
        defaults: whether these are the contestant's default settings, which take part whatever --settings-limit says.
        missing: why the setting cannot run here; empty if it can.
    """

    contestant: str
    text: str
    run: Callable[..., list[Measurement]]
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: bool = False
    missing: str = ""


_clock = time.perf_counter


def use_processor_time() -> None:
    """Measure the processor time of this process on one thread, which other processes hardly affect."""
    global _clock
    _clock = time.process_time
    torch.set_num_threads(1)


def now() -> float:
    """Current reading of the clock in seconds."""
    return _clock()


def read_clock(device: torch.device) -> float:
    """Reading of the clock in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


class Meter:
    """Counts the tokens of batches, and reads the clock only after the first step and at the bounds of windows.

    Args:
        device: device that must be idle when the clock is read.
        warm_up: optimizer steps ahead of the first window.
        steps: optimizer steps measured.
        window: optimizer steps per window; by default ``WINDOWS`` of them.
    """

    def __init__(self, device: torch.device, warm_up: int, steps: int, window: int | None = None):
        self.device = device
        self.warm_up = warm_up
        self.last = warm_up + steps
        self.window = min(steps, window or max(1, steps // WINDOWS))
        self.steps_done = self.tokens = self.targets = 0
        self.marks: list[tuple[float, int, int]] = []
        self.start = read_clock(device)
        self.seconds_to_first_step = float("nan")

    def count(self, tokens: int, targets: int) -> None:
        """Add a batch that is part of the current step."""
        self.tokens += tokens
        self.targets += targets

    def step_done(self) -> bool:
        """Record the end of an optimizer step. Returns whether it was the last one needed."""
        self.steps_done += 1
        if self.steps_done == 1:
            self.seconds_to_first_step = read_clock(self.device) - self.start
        measured = self.steps_done - self.warm_up
        if measured >= 0 and measured % self.window == 0:
            self.marks.append((read_clock(self.device), self.tokens, self.targets))
        return self.steps_done >= self.last

    def measurement(self, precision: Precision, dropout: str) -> Measurement:
        """The windows so far, as those of a contestant that ran with this precision and dropout.

        Raises:
            RuntimeError: the training ended before the first window was full.
        """
        if len(self.marks) < 2:
            raise RuntimeError(f"the training ended after {self.steps_done} steps, before a window was full")
        windows = [Window(b[0] - a[0], b[1] - a[1], b[2] - a[2]) for a, b in pairwise(self.marks)]
        return Measurement("steady", windows, self.seconds_to_first_step, precision, dropout)


def windows_of_reports(
    reports: Sequence[tuple[int, float]], loads: Sequence[tuple[int, int]], first: int, last: int
) -> list[Window]:
    """Windows between the engine's step reports, which come in order but may come late and in bursts.

    In a burst only the time of the last report says when its step was done, so windows end at last reports. A
    constant delay cancels out in the differences.

    Args:
        reports: (step, time in seconds) of steps 1, 2, ...
        loads: (tokens, targets) of the same steps.
        first: step after which the first window begins.
        last: step with which the last window may end; ``reports`` must have a later step.

    Raises:
        RuntimeError: fewer than two usable reports between the two steps.
    """
    span = [report for report in reports if first <= report[0] <= last + 1]
    usual = (span[-1][1] - span[0][1]) / max(1, len(span) - 1) if span else 0.0
    together = min(usual / 4, _TOGETHER)
    marks = [report for report, later in pairwise(span) if later[1] - report[1] > together]
    if len(marks) < 2:
        raise RuntimeError(f"too few steps to measure between steps {first} and {last}")
    count = min(WINDOWS, len(marks) - 1)
    bounds = [marks[round(i * (len(marks) - 1) / count)] for i in range(count + 1)]
    return [_window(begin, end, loads) for begin, end in pairwise(bounds)]


def _window(begin: tuple[int, float], end: tuple[int, float], loads: Sequence[tuple[int, int]]) -> Window:
    tokens, targets = (sum(column) for column in zip(*loads[begin[0] : end[0]], strict=True))
    return Window(end[1] - begin[1], tokens, targets)
