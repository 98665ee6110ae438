"""This project's engine, measured through its public API."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.measure import (
    DTYPES,
    FIRST_EPOCH,
    LATER_EPOCHS,
    Job,
    Measurement,
    describe_dropout,
    now,
    read_clock,
    windows_of_reports,
)
from model.data.tokens import CodeAlpacaDataset, epoch_order
from model.engine.config import TrainConfig
from model.engine.trainer import StepReport
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.net.device import cast_frozen, resolve_device
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel

_VALIDATION_ROWS = 64  # few: every training validates before the first step and after the last


def run_engine(
    job: Job, micro_batch_tokens: int | None = None, trunk_cache_bytes: int = TrunkCacheConfig.max_bytes
) -> list[Measurement]:
    """Train for the job's epochs. If the trunk's outputs are kept, the first epoch is measured apart from the others.

    They are kept in the same places as by the pipeline. The time to the first step includes the base's validation and
    ends with the step's report, which on a GPU comes a few steps late.
    """
    device = resolve_device(job.device)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTModel(job.config)
    freeze_bottom_layers(model, job.num_unfrozen_layers)
    cast_frozen(model, DTYPES[job.precision])
    rows = CodeAlpacaDataset(job.tokens, "train")
    steps_per_epoch = math.ceil(len(rows) / job.batch_size)
    config = TrainConfig(
        epochs=job.epochs,
        batch_size=job.batch_size,
        micro_batch_tokens=micro_batch_tokens,
        eval_freq=job.epochs * steps_per_epoch + 1,
        eval_rows=_VALIDATION_ROWS,
        precision=job.precision,
        dropout=job.dropout,
    )
    reports: list[tuple[int, float]] = []

    def on_step(report: StepReport) -> None:
        if report.step:
            reports.append((report.step, now()))

    start = read_clock(device)
    with tempfile.TemporaryDirectory() as directory:
        cache = TrunkCacheConfig(Path(directory) / "trunk-outputs", trunk_cache_bytes)
        train(model, job.tokens, config, Path(directory) / "training", "bench", on_step, cache=cache)
    first_step = reports[0][1] - start
    loads = step_loads(rows, config)
    warm_up = min(job.warm_up, max(1, steps_per_epoch // 3))
    last = job.epochs * steps_per_epoch - 1  # without the last step, which a validation follows
    phases = {FIRST_EPOCH: (warm_up, min(steps_per_epoch, last))}
    if not trunk_cache_bytes:
        phases = {"every epoch": (warm_up, last)}
    elif job.epochs > 1:
        phases[LATER_EPOCHS] = (steps_per_epoch + warm_up, last)  # a second warm-up: other kernels may run here
    dropout = describe_dropout(model.config.dropout)
    return [
        Measurement(phase, windows_of_reports(reports, loads, first, last), first_step, job.precision, dropout)
        for phase, (first, last) in phases.items()
    ]


def step_loads(rows: CodeAlpacaDataset, config: TrainConfig) -> list[tuple[int, int]]:
    """(tokens, targets) of each step of a training, in the engine's order of rows."""
    loads = []
    for epoch in range(config.epochs):
        order = epoch_order(len(rows), config.seed, epoch)
        for batch in np.split(order, range(config.batch_size, len(order), config.batch_size)):
            lengths, prompts = rows.lengths[batch].sum(axis=0).tolist()
            loads.append((lengths, lengths - prompts))
    return loads
