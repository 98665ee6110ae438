"""Flow ``finetune``: download, prepare, load weights, freeze, train, evaluate, publish, as one MLflow run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import deployment
from prefect.states import Failed

from flows.commands import repeat_command
from flows.full_disk import naming_the_disk
from flows.hooks import after_cancellation, after_crash, after_failure
from flows.job import Job, defaults, with_parameters
from flows.plan import announce
from flows.run import open_run
from flows.waiting import hold_device
from ops.settings import Settings
from ops.text import storable_errors
from ops.tracking.promotion import Verdict
from ops.tracking.runs import RunRef
from ops.tracking.shipping import NotLoggedError, must_be_logged
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.freeze import freeze
from tasks.load_weights import load_weights
from tasks.prepare import prepare
from tasks.promote import promote, score_champion
from tasks.publish import publish
from tasks.train import identify_training, train

NOT_LOGGED = "TrainedNotLogged"  # name of the flow's state


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished flow run leaves behind.

    Attributes:
        run: the MLflow run.
        model: URI of the registered version.
        metrics: scores of base and tuned model.
        samples: the first two prompts with reference and both completions.
        verdict: whether the version became champion, and why; None without ``promote``.
        seconds: what each step took, in order.
    """

    run: RunRef
    model: str
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    verdict: Verdict | None
    seconds: dict[str, float]


@flow(
    name="finetune",
    log_prints=True,
    on_failure=[after_failure],
    on_crashed=[after_crash],
    on_cancellation=[after_cancellation],
)
@with_parameters
def finetune(**parameters: Any) -> FinetuneResult | None:
    """Fine-tune the top blocks of a GPT-2 on code instructions."""
    job = Job.from_parameters(parameters)
    try:
        with storable_errors(), naming_the_disk(Settings.load().data_root):
            return _finetune(job)
    except NotLoggedError as error:
        command = repeat_command(deployment.name, job.flat(), defaults())
        message = f"{error}. This command logs it, without training again: {command}"
        # Prefect takes it for the flow's state, and its caller gets the error.
        return Failed(name=NOT_LOGGED, message=message, data=NotLoggedError(message))  # type: ignore[return-value]


def _finetune(job: Job) -> FinetuneResult | None:
    with open_run(job) as run:
        if run.ended:
            # Prefect takes it for the flow's state, and its caller gets None.
            return run.ended  # type: ignore[return-value]
        sources = run.sources or download(job.sources)
        tokens = prepare(run.mlflow, sources, run.prepare)
        model = load_weights(sources.weights, job.sources.model_size)
        plan = freeze(model, job.freeze)
        training = identify_training(tokens, model, plan, job.train, job.hardware.device)
        announce(run.mlflow, run.settings, training, job.hardware.device)
        run.hold(training)
        directory = Path(training.directory)
        # One hold for both: another run must not train between this training and its evaluation.
        with hold_device(run.settings, job.hardware.device) as device:
            checkpoint = train(run.mlflow, training, device, job.hardware.trunk_cache_gb)
            with must_be_logged(run.mlflow.tracking_uri, directory):
                evaluation = evaluate(
                    run.mlflow, training, checkpoint, job.sampling, device, job.hardware.trunk_cache_gb
                )
                rival = score_champion(training, checkpoint, device) if job.night.promote else None
        with must_be_logged(run.mlflow.tracking_uri, directory):
            model_uri = publish(run.mlflow, sources, training, checkpoint, evaluation)
            verdict = None
            if rival:
                verdict = promote(run.mlflow, model_uri, evaluation, rival, job.night.promote_margin, job.train.seed)
        run.remove_when_closed(checkpoint)
        samples = json.loads(Path(evaluation.samples).read_text())[:2]
        return FinetuneResult(run.mlflow, model_uri, evaluation.metrics, samples, verdict, run.stopwatch.seconds)
