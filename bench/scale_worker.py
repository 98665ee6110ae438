"""What each rank of ``bench.scale`` does: ``python -m torch.distributed.run ... -m bench.scale_worker JOB``."""

from __future__ import annotations

import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.engine import step_loads
from model.data.tokens import CodeAlpacaDataset
from model.engine import engine
from model.engine.config import TrainConfig
from model.engine.ranks import Ranks, join_ranks
from model.engine.trainer import StepReport
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.net.config import GPTConfig
from model.net.device import cast_frozen, give_memory_back, resolve_precision
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel

_VALIDATION_ROWS = 64  # few: every training validates before the first step and after the last
_WARM_UP_STEPS = 4
_TIMEOUT = 300.0  # seconds of an exchange: the first one waits until all ranks have compiled their kernels


@dataclass(frozen=True)
class ScaleJob:
    """What the ranks of one process group measure.

    Attributes:
        tokens: directory of the token files.
        out: file for a JSON line per training.
        size: preset whose shape the random weights have.
        num_unfrozen_layers: blocks that train, from the top.
        batch_sizes: rows of an optimizer step, one measurement each.
        epochs: of each training, two at least.
        repeats: trainings of each batch size.
        device: cpu or cuda.
        dropout: rate in the trained blocks.
        profile: measure the parts of a step too.
    """

    tokens: str
    out: str
    size: str
    num_unfrozen_layers: int
    batch_sizes: list[int]
    epochs: int
    repeats: int
    device: str
    dropout: float
    profile: bool


@dataclass(frozen=True)
class Timing:
    """One training.

    Attributes:
        world: number of ranks.
        batch_size: rows of an optimizer step.
        repeat: number of the training, from 0.
        first_epoch: useful tokens per second from the base's validation to the end of the first epoch: with the
            computation of all trunk outputs.
        cached_epochs: useful tokens per second of the epochs after it, without the last step.
        trunk: where the outputs of the trunk were kept.
        step_ms: median time of a step in the cached epochs.
        slowest_step_ms: of these steps.
        exchange_ms: with ``profile``, median over these steps of the shortest time that a rank spent in exchanges
            of gradients and parameters: none of it is waiting for other ranks.
        waiting_ms: with ``profile``, median of what the ranks spent longer than that, on average.
        graphs: with ``profile``, CUDA graphs that rank 0 captured in the whole training.
        capture_ms: with ``profile``, time of the host for each of them, on average.
    """

    world: int
    batch_size: int
    repeat: int
    first_epoch: float
    cached_epochs: float
    trunk: str
    step_ms: float
    slowest_step_ms: float
    exchange_ms: float | None = None
    waiting_ms: float | None = None
    graphs: int | None = None
    capture_ms: float | None = None


@dataclass(frozen=True, eq=False)
class TimedRanks(Ranks):
    """Ranks that measure how long the exchanges of each step take on the device.

    Attributes:
        steps: of each step, clock readings before and after each exchange.
    """

    steps: list[list[tuple[Any, Any]]] = field(default_factory=list)

    def sum_own_part(self, flat: Tensor) -> Tensor:
        self.steps.append([])  # a step's first exchange
        with self._timing():
            return super().sum_own_part(flat)

    def sum_in_order(self, tensors: Sequence[Tensor]) -> None:
        with self._timing():
            super().sum_in_order(tensors)

    def gather_parts(self, flat: Tensor) -> None:
        with self._timing():
            super().gather_parts(flat)

    def milliseconds(self) -> list[float]:
        """Of each step; waits for the device."""
        if self.device.type != "cuda":
            return [sum(1e3 * (end - begin) for begin, end in step) for step in self.steps]
        torch.cuda.synchronize(self.device)
        return [sum(begin.elapsed_time(end) for begin, end in step) for step in self.steps]

    @contextmanager
    def _timing(self) -> Iterator[None]:
        begin = self._read()
        yield
        self.steps[-1].append((begin, self._read()))

    def _read(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def timing_captures() -> Iterator[list[float]]:
    """Seconds of each capture in the body; a pass is captured as two graphs."""
    plain, found = engine.capturing, list[float]()

    @contextmanager
    def timed(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        begin = time.perf_counter()
        with plain(graph, pool):
            yield
        found.append(time.perf_counter() - begin)

    engine.capturing = timed
    try:
        yield found
    finally:
        engine.capturing = plain


def build_model(job: ScaleJob, device: torch.device) -> GPTModel:
    """A model with the same random weights each time, and on all ranks."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTModel(GPTConfig.preset(job.size))
    freeze_bottom_layers(model, job.num_unfrozen_layers)
    cast_frozen(model, resolve_precision("auto", device))
    return model


def run_training(
    job: ScaleJob, batch_size: int, ranks: Ranks, max_steps: int | None = None
) -> tuple[list[float], TrainConfig, str]:
    """Train a fresh model.

    Returns:
        Seconds at the report of each step, from 0, the base's validation; none on other ranks than the first. The
        configuration. Where the trunk's outputs were kept.
    """
    config = TrainConfig(
        epochs=job.epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        eval_freq=10**9,
        eval_rows=_VALIDATION_ROWS,
        dropout=job.dropout,
    )
    reports: list[float] = []

    def on_step(report: StepReport) -> None:
        reports.append(time.perf_counter())

    model = build_model(job, ranks.device)
    directory = Path(ranks.from_first(tempfile.mkdtemp))
    try:
        cache = TrunkCacheConfig(directory / "trunk-outputs")
        result = train(
            model, Path(job.tokens), config, directory / "training", "scale", on_step, cache=cache, ranks=ranks
        )
    finally:
        if ranks.leads:
            shutil.rmtree(directory, ignore_errors=True)
    del model
    gc.collect()
    give_memory_back()
    return reports, config, result.trunk


def measure(job: ScaleJob, batch_size: int, repeat: int, ranks: Ranks) -> Timing | None:
    """Train once; the timing on rank 0, None on the others."""
    timed = TimedRanks(**vars(ranks)) if job.profile else ranks
    with timing_captures() as captures:
        reports, config, trunk = run_training(job, batch_size, timed)
    rows = CodeAlpacaDataset(Path(job.tokens), "train")
    epoch = math.ceil(len(rows) / batch_size)
    spans = ranks.gather(timed.milliseconds() if isinstance(timed, TimedRanks) else [])
    if not ranks.leads:
        return None
    tokens = [tokens for tokens, _ in step_loads(rows, config)]
    last = len(reports) - 2  # without the last step, which a validation follows
    steps = [1e3 * (reports[step] - reports[step - 1]) for step in range(epoch + 1, last + 1)]
    parts: dict[str, Any] = {}
    if job.profile:
        parts = {"graphs": len(captures), "capture_ms": 1e3 * sum(captures) / max(1, len(captures))}
    if spans[0]:
        cached = [some[epoch:last] for some in spans]
        shortest = [min(some) for some in zip(*cached, strict=True)]
        waits = [statistics.mean(some) - min(some) for some in zip(*cached, strict=True)]
        parts |= {"exchange_ms": statistics.median(shortest), "waiting_ms": statistics.median(waits)}
    return Timing(
        ranks.world,
        batch_size,
        repeat,
        sum(tokens[:epoch]) / (reports[epoch] - reports[0]),
        sum(tokens[epoch:last]) / (reports[last] - reports[epoch]),
        trunk.removeprefix("frozen blocks' outputs "),
        statistics.median(steps),
        max(steps),
        **parts,
    )


def main() -> None:
    """Measure what the job says."""
    job = ScaleJob(**json.loads(Path(sys.argv[1]).read_text()))
    with join_ranks(torch.device(job.device), _TIMEOUT) as ranks:
        for batch_size in job.batch_sizes:
            run_training(job, batch_size, ranks, max_steps=_WARM_UP_STEPS)  # compiles, loads and connects
            for repeat in range(job.repeats):
                timing = measure(job, batch_size, repeat, ranks)
                if timing is None:
                    continue
                with Path(job.out).open("a") as stream:
                    stream.write(json.dumps(asdict(timing)) + "\n")
                print(describe(timing), flush=True)


def describe(timing: Timing) -> str:
    """A line for the log."""
    parts = ""
    if timing.exchange_ms is not None:
        parts = f", of it {timing.exchange_ms:.2f} ms exchange and {timing.waiting_ms:.2f} ms waiting"
    if timing.graphs:
        parts += f"; {timing.graphs} graphs, {timing.capture_ms:.1f} ms each"
    return (
        f"{timing.world} ranks, {timing.batch_size} rows, training {timing.repeat}: first epoch "
        f"{timing.first_epoch:,.0f}, cached {timing.cached_epochs:,.0f} useful tokens/s; step {timing.step_ms:.2f} "
        f"ms (slowest {timing.slowest_step_ms:.1f}){parts}; {timing.trunk}"
    )


if __name__ == "__main__":
    main()
