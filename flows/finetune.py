"""Flow ``finetune``: download, prepare, load weights, freeze, train, evaluate, publish, as one MLflow run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from flows.endings import with_ending
from flows.hooks import after_cancellation, after_crash, after_failure
from flows.job import Job, with_parameters
from flows.naming import flow_run_name
from flows.plan import announce
from flows.quiet_logs import keep_tracebacks_out
from flows.run import open_run
from flows.waiting import hold_devices
from model.evaluation.comparison import Difference
from ops.tracking.promotion import Verdict
from ops.tracking.runs import RunRef
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.freeze import freeze
from tasks.load_weights import load_weights
from tasks.prepare import prepare
from tasks.promote import promote, score_champion
from tasks.publish import publish
from tasks.train import identify_training, train

keep_tracebacks_out()


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished flow run leaves behind.

    Attributes:
        run: the MLflow run.
        model: URI of the registered version.
        metrics: scores of base and tuned model.
        differences: of these scores, tuned - base.
        samples: the first two prompts with reference and both completions.
        verdict: whether the version became champion, and why; None without ``promote``.
        seconds: what each step took, in order.
    """

    run: RunRef
    model: str
    metrics: dict[str, float]
    differences: tuple[Difference, ...]
    samples: list[dict[str, Any]]
    verdict: Verdict | None
    seconds: dict[str, float]


@flow(
    name="finetune",
    flow_run_name=flow_run_name(),
    log_prints=True,
    validate_parameters=False,  # from_parameters does, in one sentence
    on_failure=[after_failure],
    on_crashed=[after_crash],
    on_cancellation=[after_cancellation],
)
@with_parameters
@with_ending
def finetune(**parameters: Any) -> FinetuneResult | None:
    """Fine-tune the top blocks of a GPT-2 on code instructions."""
    job = Job.from_parameters(parameters)
    with open_run(job) as run:
        if run.ended:
            # Prefect makes a returned state the state of the flow run; the caller of the flow gets None.
            return run.ended  # type: ignore[return-value]
        sources = run.sources or download(job.sources)
        tokens = prepare(run.mlflow, sources, run.prepare)
        model = load_weights(sources.weights, job.sources.model_size)
        plan = freeze(model, job.freeze)
        training = identify_training(tokens, model, plan, job.train, job.hardware.device)
        announce(run.mlflow, run.settings, training, job.hardware)
        run.hold_training(training)
        # One hold for both: another run must not train between this training and its evaluation.
        gigabytes = job.hardware.trunk_cache_gb
        with hold_devices(job.hardware.device, job.hardware.gpus) as devices:
            checkpoint = train(run.mlflow, training, devices, gigabytes)
            evaluation = evaluate(run.mlflow, training, checkpoint, job.sampling, devices, gigabytes)
            rival = None
            if job.night.promote:
                rival = score_champion(training, checkpoint, job.sampling.score_rows, devices.first)
        model_uri = publish(run.mlflow, sources, training, checkpoint, evaluation)
        verdict = None
        if rival:
            verdict = promote(run.mlflow, model_uri, evaluation, rival, job.night.promote_margin, job.train.seed)
        run.remove_when_closed(checkpoint)
        samples = json.loads(Path(evaluation.samples).read_text())[:2]
        return FinetuneResult(
            run=run.mlflow,
            model=model_uri,
            metrics=evaluation.metrics,
            differences=evaluation.differences,
            samples=samples,
            verdict=verdict,
            seconds=run.stopwatch.seconds,
        )
