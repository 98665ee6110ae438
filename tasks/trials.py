"""Task ``train_trials`` (tag gpu): train the trials of a sweep, or go on with an interrupted sweep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from model.engine.checkpoint import MODEL_FILE, load_state
from model.files import sha256_json
from model.net.config import GPTConfig
from model.net.freezing import plan_freeze
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.runs import RunRef
from ops.tracking.steps import pipeline_step
from tasks.config import TrialConfig
from tasks.progress import Progress
from tasks.references import ModelRef, SweepRef, TokensRef, TrialRef, TrialResult
from tasks.train import identify_training, is_worth_a_retry
from tasks.trial_helpers import working_helpers
from tasks.trial_records import best_of, read_outcome, start_sweep
from tasks.trial_worker import Order, TrialWorker, write_order

# Tags of the sweep's MLflow run that its trials have too: hooks and watcher find them by the flow run.
_INHERITED = ("prefect.", "mlflow.source.", "mlflow.note.content", "data_sha256", "subset")
_ORDER = "order.json"  # in the sweep's directory
_POLL_SECONDS = 0.1  # while helpers train the last trials


def identify_sweep(
    tokens: TokensRef, model: ModelRef, trials: Sequence[TrialConfig], device: str, end_early: bool
) -> SweepRef:
    """Plan and identify the training of each trial.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: a model has fewer blocks than a trial trains.
    """
    shape = GPTConfig(**model.config)
    plans = {freeze: plan_freeze(shape, freeze) for freeze in {trial.freeze for trial in trials}}
    trainings = [identify_training(tokens, model, plans[trial.freeze], trial.train, device) for trial in trials]
    identity = sha256_json({"trainings": [each.identity for each in trainings], "end_early": end_early})
    directory = Settings.load().trainings / f"sweep-{identity}"
    refs = tuple(
        TrialRef(
            trial.name,
            trial.changes,
            trial.params,
            replace(each, directory=str(directory / f"trial-{number:03d}")),
        )
        for number, (trial, each) in enumerate(zip(trials, trainings, strict=True), 1)
    )
    return SweepRef(identity, str(directory), refs, end_early)


@task(
    name="train_trials",
    tags=["gpu"],
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=is_worth_a_retry,
    cache_policy=NO_CACHE,
)
@pipeline_step
def train_trials(
    run: RunRef, sweep: SweepRef, device: str, others: Mapping[str, str], trunk_cache_gb: float
) -> list[TrialResult]:
    """Train each trial of a sweep, or go on where an interrupted attempt of the sweep stopped.

    The base is loaded once, and the outputs of its frozen blocks are computed once. A trial is trained bit for bit as
    if it were alone. A trial that diverges, or that memory does not hold, is a result; the others go on.

    Each further GPU gets a process of its own, which holds that GPU's lock while it trains (tasks/trial_helpers.py).
    All processes take the next trial that nobody has. What a helper leaves behind, this process trains.

    The caller holds the device and the sweep.

    Args:
        run: the sweep's MLflow run; that of each trial is beneath it.
        device: that the caller holds.
        others: devices that helpers may use when they are free, by the names of their locks.

    Returns:
        The results, in the order of the trials.

    Raises:
        NotLoggedError: a trial is finished, and MLflow could not take its metrics.
    """
    log = get_run_logger()
    tags = client(run.tracking_uri).get_run(run.run_id).data.tags
    order = Order(
        run=run,
        sweep=sweep,
        id=start_sweep(sweep, log),
        tags={name: value for name, value in tags.items() if name.startswith(_INHERITED)},
        holder=str(flow_run.name),
        flow_run_id=str(flow_run.id),
        trunk_cache_gb=trunk_cache_gb,
        places=dict(others),
    )
    progress = Progress(log)
    worker = TrialWorker(order, device, progress, log)
    left = sum(read_outcome(trial, run.run_id, log) is None for trial in sweep.trials)
    helpers = max(0, min(len(others), left - 1))  # this process trains one of them
    path = Path(sweep.directory) / _ORDER
    if helpers:
        write_order(path, order)
    with progress.courier, working_helpers(helpers, str(path), log):
        results = _until_all_have_ended(worker, sweep)
        while (best := best_of(results)) and _is_damaged(best, log):
            worker.train_again(best.trial)
            results = _until_all_have_ended(worker, sweep)
    return results


def _until_all_have_ended(worker: TrialWorker, sweep: SweepRef) -> list[TrialResult]:
    while len(results := worker.work()) < len(sweep.trials):
        time.sleep(_POLL_SECONDS)
    return results


def _is_damaged(best: TrialResult, log: Any) -> bool:
    """Whether the checkpoint of the best trial is damaged."""
    try:
        load_state(Path(best.checkpoint.best), [MODEL_FILE])
    except ValueError as error:
        log.warning("%s: trial %s is trained again", error, best.trial.name)
        return True
    return False
