"""The size of a run, printed and logged before training begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger

from flows.job import HardwareConfig
from model.net.device import count_processes, resolve_device, resolve_precision
from model.net.freezing import FreezePlan
from ops.display import SHOWN, display
from ops.settings import Settings
from ops.tracking.runs import RunRef, log_params
from ops.tracking.stopwatch import end_step
from tasks.references import SweepRef, TrainingRef


@dataclass(frozen=True)
class Plan:
    """The size of the work.

    Attributes:
        rows: for people, as names and values.
        params: for MLflow.
        disk_bytes: needed at most, checkpoints and the logged model together.
    """

    rows: tuple[tuple[str, str], ...]
    params: dict[str, Any]
    disk_bytes: int


def _show(rows: tuple[tuple[str, str], ...]) -> None:
    """Show a plan on the display, and log it."""
    text = "\n".join(f"{name:<10} {value}" for name, value in rows)
    get_run_logger().info(text, extra=SHOWN)
    display().table("plan", rows)


def announce(run: RunRef, settings: Settings, training: TrainingRef, hardware: HardwareConfig) -> None:
    """Print what the run is going to do, log it, and refuse what would end in a full disk.

    Raises:
        OSError: as check_disk.
    """
    plan = describe_plan(training, hardware.device, count_processes(hardware.device, hardware.gpus))
    log_params(run, plan.params)
    _show(plan.rows)
    check_disk(settings.data_root, plan.disk_bytes)
    end_step("plan")


def announce_sweep(run: RunRef, settings: Settings, sweep: SweepRef, device: str) -> SweepRef:
    """Print what a sweep is going to do, and refuse what would end in a full disk.

    Returns:
        The sweep, with what follows from the parameters of each trial among them.

    Raises:
        OSError: as check_disk.
    """
    plans = [describe_plan(trial.training, device) for trial in sweep.trials]
    names = "; ".join(trial.name for trial in sweep.trials)
    different = tuple(row for rows in dict.fromkeys(plan.rows for plan in plans) for row in rows)
    _show((("sweep", f"{len(sweep.trials)} trials: {names}"), *different))
    # Besides the trial that trains, the best one so far keeps its checkpoints.
    check_disk(settings.data_root, 2 * max(plan.disk_bytes for plan in plans))
    end_step("plan")
    trials = tuple(
        replace(trial, params={**trial.params, **plan.params})
        for trial, plan in zip(sweep.trials, plans, strict=True)
    )
    return replace(sweep, trials=trials, planned=tuple(plans[0].params))


def describe_plan(training: TrainingRef, device: str, processes: int = 1) -> Plan:
    """Rows, tokens, steps, trainable share, device, number of processes and disk of a run."""
    config, freeze, counts = training.config, training.plan, training.tokens.counts
    place = resolve_device(device)
    dtype = str(resolve_precision(config.precision, place)).removeprefix("torch.")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    devices = name_devices(place, processes)
    rows, tokens = counts["rows"], counts["tokens"]
    steps = config.total_steps(rows["train"])
    disk = disk_needed(freeze)
    parameters = f"{freeze.total:,} parameters, {freeze.trainable:,} train ({freeze.share:.1%})"
    lines = (
        ("model", f"{training.model.model_size} from {training.model.source}, {parameters}"),
        ("rows", f"{rows['train']:,} train, {rows['validation']:,} validation, {rows['test']:,} test"),
        ("tokens", f"{tokens['train']:,} an epoch, {counts['target_tokens']['train']:,} of them targets"),
        ("steps", f"{steps:,} of {config.batch_size} rows"),
        ("device", f"{devices} ({name}), {dtype}"),
        ("disk", f"up to {disk / 1e9:.1f} GB"),
    )
    params = {
        "total_steps": steps,
        "trainable_parameters": freeze.trainable,
        "total_parameters": freeze.total,
        "device_name": name,
        "dtype": dtype,
    }
    return Plan(lines, params, disk)


def name_devices(device: torch.device, processes: int) -> str:
    """Where a run trains: its device, or the number of its processes on devices of a kind."""
    return str(device) if processes == 1 else f"{processes} processes on {device.type}"


def disk_needed(plan: FreezePlan) -> int:
    """Bytes that a run writes at most."""
    # Best, last and one being written: weights and two moments, 4 bytes each; the model as export and in MLflow.
    return 3 * 12 * plan.trainable + 2 * 4 * plan.total


def check_disk(directory: Path, needed: int) -> None:
    """Refuse to start what would end in a full disk.

    Raises:
        OSError: naming the path and both sizes.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {free / 1e9:.1f} GB free, the run may need {needed / 1e9:.1f} GB: free some "
            "(trainings/ has what was cut short and never resumed, tokens/ and trunk-outputs/ can be made again), "
            "or set FINETUNE_DATA_ROOT to another disk"
        )
