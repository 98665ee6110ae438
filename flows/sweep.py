"""Flow ``sweep``: a trial for each combination of a grid; the best is published as the result of ``finetune`` is."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow

from flows.endings import with_ending
from flows.finetune import FinetuneResult
from flows.hooks import after_cancellation, after_crash, after_failure
from flows.job import with_parameters
from flows.naming import flow_run_name
from flows.plan import announce_sweep
from flows.quiet_logs import keep_tracebacks_out
from flows.run import open_run
from flows.trials import SweepJob
from flows.waiting import count_devices, hold_devices, other_devices
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.load_weights import load_weights
from tasks.prepare import prepare
from tasks.promote import promote, score_champion
from tasks.publish import publish
from tasks.rank import rank
from tasks.references import TrialResult
from tasks.trial_helpers import waiting_helpers
from tasks.trials import identify_sweep, train_trials

keep_tracebacks_out()


@dataclass(frozen=True)
class SweepResult(FinetuneResult):
    """What a finished sweep leaves behind: the result of the best trial, and all trials.

    Attributes:
        trials: in the order in which they were trained.
        best: the one that was published.
    """

    trials: list[TrialResult]
    best: TrialResult


@flow(
    name="sweep",
    flow_run_name=flow_run_name(SweepJob),
    log_prints=True,
    validate_parameters=False,  # from_parameters does, in one sentence
    on_failure=[after_failure],
    on_crashed=[after_crash],
    on_cancellation=[after_cancellation],
)
@functools.partial(with_parameters, kind=SweepJob)
@with_ending
def sweep(**parameters: Any) -> SweepResult:
    """Train one trial for each combination of a grid, and publish the one with the lowest validation loss."""
    job = SweepJob.from_parameters(parameters)
    device_choice, gigabytes = job.hardware.device, job.hardware.trunk_cache_gb
    helpers = min(count_devices(device_choice), len(job.trials())) - 1
    with waiting_helpers(helpers), open_run(job) as run:
        sources = download(job.sources)
        tokens = prepare(run.mlflow, sources, run.prepare)
        model = load_weights(sources.weights, job.sources.model_size)
        trials = identify_sweep(tokens, model, job.trials(), device_choice, job.sweep.end_early)
        trials = announce_sweep(run.mlflow, run.settings, trials, device_choice)
        run.hold_sweep(trials)
        with hold_devices(device_choice, 1) as devices:
            device = devices.first
            others = other_devices(device_choice, device)
            results = train_trials(run.mlflow, trials, device, others, gigabytes)
            best = rank(run.mlflow, trials, results)
            training, checkpoint = best.trial.training, best.checkpoint
            sampling = replace(job.sampling, seed=training.config.seed)  # as a run of this training alone
            evaluation = evaluate(run.mlflow, training, checkpoint, sampling, devices, gigabytes)
            rival = None
            if job.night.promote:
                rival = score_champion(training, checkpoint, job.sampling.score_rows, device)
        # After the device is free: who holds this training may wait for the device.
        run.hold_training(training)
        model_uri = publish(run.mlflow, sources, training, checkpoint, evaluation)
        verdict = None
        if rival:
            verdict = promote(run.mlflow, model_uri, evaluation, rival, job.night.promote_margin, sampling.seed)
        run.remove_sweep_when_closed(trials)
        return SweepResult(
            run=run.mlflow,
            model=model_uri,
            metrics=evaluation.metrics,
            differences=evaluation.differences,
            samples=json.loads(Path(evaluation.samples).read_text())[:2],
            verdict=verdict,
            seconds=run.stopwatch.seconds,
            trials=results,
            best=best,
        )
