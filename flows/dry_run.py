"""What a run would need, from what is on this machine: nothing is downloaded, trained or kept."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.arguments import Request
from flows.job import Job
from flows.plan import disk_needed, name_devices
from flows.trials import SweepJob, job_kind
from model.data.layout import find_layout
from model.data.preparing import prepare
from model.demo import EMBEDDED_BASE, grammar
from model.engine.flops import matmul_ceiling, necessary_flops
from model.files import path_of
from model.net.config import GPTConfig
from model.net.device import count_processes, resolve_device, resolve_precision
from model.net.freezing import FreezePlan, plan_freeze
from model.net.layout import CONFIG_FILE
from model.net.tokenizer import load_tokenizer
from ops.text import printable
from tasks.config import DEMO
from tasks.paths import directory_of, is_on_hub

_UNKNOWN = "not known before the data set is downloaded"


@dataclass(frozen=True)
class Rows:
    """The rows of a data set that is on this machine.

    Attributes:
        counts: as prepared: rows and tokens by split.
        exact: whether the tokens are counted with the run's own tokenizer.
    """

    counts: dict[str, Any]
    exact: bool


def show_estimate(request: Request) -> None:
    """Print rows, tokens, steps, memory, disk and time of a run as a table.

    Raises:
        ValueError: the data set cannot be used, or the parameters contradict this machine.
    """
    job = job_kind(request.flow).from_parameters(request.parameters)
    console = Console()
    with console.status("reading the data set ..."):
        rows = _count_rows(job)
    with console.status("measuring the device ..."):
        lines = estimate(job, rows)
    table = Table(title="dry run: nothing was downloaded or trained", show_header=False, title_justify="left")
    for name, value in lines:
        table.add_row(Text(name), Text(printable(value)))
    console.print(table)


def _count_rows(job: Job) -> Rows | None:
    """The rows of the data set; None if it would have to be downloaded.

    A night's choice of rows is not known either: it depends on the nights before.
    """
    source = job.sources
    if source.dataset != DEMO and is_on_hub(source.dataset):
        return None
    own = source.tokenizer_dir or source.weights_dir
    exact = bool(own) or source.model_size == "tiny"
    config = _shape(job) if own else GPTConfig.preset("tiny")
    tokenizer = load_tokenizer(directory_of("tokenizer_dir", own) if own else EMBEDDED_BASE, config.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = path_of("dataset", source.dataset)
        if source.dataset == DEMO:
            folder = Path(scratch) / "rows"
            folder.mkdir()
            grammar.write_rows(folder)
        layout = find_layout(folder, source.dataset_config)
        meta = prepare(layout.splits, tokenizer, job.prepare, Path(scratch) / "tokens")
    return Rows(meta["counts"], exact)


def estimate(job: Job, rows: Rows | None) -> list[tuple[str, str]]:
    """Names and values of the table.

    Args:
        rows: None if they are not known.
    """
    config = _shape(job)
    plan = plan_freeze(config, job.freeze)
    device = resolve_device(job.hardware.device)
    dtype = resolve_precision(job.train.precision, device)
    trials = len(job.trials()) if isinstance(job, SweepJob) else 1
    lines = [
        ("model", f"{job.sources.model_size}, {plan.total:,} parameters, {plan.trainable:,} train ({plan.share:.1%})")
    ]
    if trials > 1:
        lines.append(("trials", f"{trials}; steps and time are those of one"))
    lines += _row_lines(job, rows)
    devices = name_devices(device, count_processes(job.hardware.device, job.hardware.gpus))
    lines.append(("device", f"{devices}, {str(dtype).removeprefix('torch.')}"))
    lines.append(("memory", _memory(plan, dtype)))
    disk = f"up to {disk_needed(plan) / 1e9:.1f} GB for checkpoints and the model"
    lines.append(("disk", disk + _kept(job, config, rows, dtype)))
    lines.append(("time", _time(job, config, rows, device, dtype)))
    return lines


def _shape(job: Job) -> GPTConfig:
    folder = job.sources.weights_dir
    return GPTConfig.from_json(Path(folder) / CONFIG_FILE) if folder else GPTConfig.preset(job.sources.model_size)


def _row_lines(job: Job, rows: Rows | None) -> list[tuple[str, str]]:
    if rows is None:
        steps = f"{job.train.max_steps:,} at most (max_steps)" if job.train.max_steps else _UNKNOWN
        return [("rows", _UNKNOWN), ("tokens", _UNKNOWN), ("steps", steps)]
    found, tokens = rows.counts["rows"], rows.counts["tokens"]["train"]
    about = "" if rows.exact else "about (estimated with the embedded tokenizer, which cuts text finer) "
    return [
        ("rows", f"{found['train']:,} train, {found['validation']:,} validation, {found['test']:,} test"),
        ("tokens", f"{about}{tokens:,} an epoch"),
        ("steps", f"{job.train.total_steps(found['train']):,} of {job.train.batch_size} rows"),
    ]


def _memory(plan: FreezePlan, dtype: torch.dtype) -> str:
    """Frozen weights in the dtype of the computation; trained ones in fp32, with gradient and two moments."""
    frozen = (plan.total - plan.trainable) * dtype.itemsize
    return f"{(frozen + 16 * plan.trainable) / 1e9:.2f} GB for weights, gradients and AdamW; activations come on top"


def _kept(job: Job, config: GPTConfig, rows: Rows | None, dtype: torch.dtype) -> str:
    """What the frozen blocks' outputs take, in memory or on the disk."""
    if rows is None or not job.hardware.trunk_cache_gb or not job.freeze.freeze_layers:
        return ""
    size = rows.counts["tokens"]["train"] * config.n_embd * dtype.itemsize / 1e9
    return f", about {min(size, job.hardware.trunk_cache_gb):.2f} GB for frozen blocks' outputs"


def _time(job: Job, config: GPTConfig, rows: Rows | None, device: torch.device, dtype: torch.dtype) -> str:
    """The matrix products of the training, at the speed that the device reaches now."""
    if rows is None:
        return _UNKNOWN
    counts, train = rows.counts, job.train
    steps, count = train.total_steps(counts["rows"]["train"]), counts["rows"]["train"]
    epochs = min(train.epochs, steps * train.batch_size / max(1, count))
    tokens = counts["tokens"]["train"] - count  # the last token of a row is only predicted
    frozen = config.n_layer - job.freeze.num_unfrozen_layers if job.freeze.freeze_layers else 0
    targets = counts["target_tokens"]["train"]
    passed, predicted, once = (round(share) for share in (epochs * tokens, epochs * targets, min(1, epochs) * tokens))
    flops = necessary_flops(config, frozen, passed, predicted, once, job.freeze.train_head)
    speed = matmul_ceiling(device, dtype)
    seconds = flops / speed
    length = f"about {seconds:,.0f} s" if seconds >= 1 else "less than 1 s"
    return (
        f"{length} of training, if its matrix products run at {_shown_speed(speed)} as on this device just now; "
        "validations and the evaluation come on top"
    )


def _shown_speed(flops: float) -> str:
    """Operations per second with three digits; a busy processor does less than a hundredth of a TFLOP/s."""
    number, unit = (flops / 1e12, "TFLOP/s") if flops >= 1e12 else (flops / 1e9, "GFLOP/s")
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
