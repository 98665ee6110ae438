"""What surrounds the pipeline of a flow run: MLflow run and tags, the night, locks, the stopwatch, the clean-up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_UI_URL

from flows.job import Job, defaults
from flows.nightly import begin_night
from flows.waiting import hold_training
from model.data.config import PrepareConfig
from model.net.device import resolve_device
from ops.mistakes import exit_status
from ops.recovery.limits import ensure_limit, is_temporary
from ops.recovery.reaper import ATTEMPT_TAG, FLOW_RUN_TAG, HOOK_SECONDS, reap
from ops.servers import gpu_count
from ops.settings import Settings
from ops.tracking.runs import RunRef, delete_run, log_metrics, tracked_run
from ops.tracking.stopwatch import Stopwatch, start_stopwatch
from tasks.references import CheckpointRef, Sources, SweepRef, TrainingRef


@dataclass
class Run:
    """A flow run under way.

    Attributes:
        settings: of this process.
        prepare: how rows are prepared; of a night, the rows that it chose.
        stopwatch: seconds by step.
        mlflow: its MLflow run; an empty reference until one is opened.
        sources: rows and weights, if a night has fetched them already.
        ended: the state in which the flow run ends at once; None if there is work.
        held: what is held until the run is over: the night and the training.
        finished: directories of finished trainings, deleted once the MLflow run is closed.
        began: whether a training has begun.
    """

    settings: Settings
    prepare: PrepareConfig
    stopwatch: Stopwatch
    mlflow: RunRef = field(default_factory=lambda: RunRef("", "", ""))
    sources: Sources | None = None
    ended: State[Any] | None = None
    held: ExitStack = field(default_factory=ExitStack)
    finished: list[Path] = field(default_factory=list)
    began: bool = False

    def hold_training(self, training: TrainingRef) -> None:
        """Hold a training until everything of this run is over: another run of it would overwrite its checkpoints."""
        self.began = True
        self.held.enter_context(hold_training(self.settings, training.identity))

    def hold_sweep(self, sweep: SweepRef) -> None:
        """Hold a sweep until everything of this run is over: another run of it would train the same trials."""
        self.began = True
        self.held.enter_context(hold_training(self.settings, f"sweep {sweep.identity}"))

    def remove_when_closed(self, checkpoint: CheckpointRef) -> None:
        """Delete a training once this run's MLflow run is closed: MLflow has all of it then.

        A later run of equal settings trains afresh. After a failure the training stays, to go on from.
        """
        self.finished.append(Path(checkpoint.directory))

    def remove_sweep_when_closed(self, sweep: SweepRef) -> None:
        """The same for a sweep: a later run of equal settings trains all trials afresh."""
        self.finished.append(Path(sweep.directory))


@contextmanager
def open_run(job: Job) -> Iterator[Run]:
    """Open all that surrounds the pipeline, and close it with the flow's fate.

    Yields:
        The run; its ``ended`` is set, and no MLflow run is open, where a night has nothing to do.
    """
    log = get_run_logger()
    settings = Settings.load()
    settings.claim_caches()
    run = Run(settings, job.prepare, start_stopwatch())
    _warn_of_a_slow_device(job)
    _tidy_up(settings)
    run.stopwatch.end("plan")
    with run.held:
        night = None
        if job.night.subset:
            begun = begin_night(settings, job.sources, job.prepare, job.night)
            if isinstance(begun, State):
                run.ended = begun
                yield run
                return
            night = begun
            run.held.enter_context(night.held)
            run.sources, run.prepare = night.sources, night.prepare
        name = str(flow_run.name)
        size = job.sources.model_size
        title = f"{job.title} {name}"
        with (
            _without_trace_of_mistakes(run),
            tracked_run(settings, title, job.logged(), _tags(job), defaults(type(job))) as run.mlflow,
        ):
            url = run.mlflow.url
            log.info("MLflow run %s", url or f"{run.mlflow.run_id} in {run.mlflow.tracking_uri}")
            if url:
                create_link_artifact(url, key="mlflow-run", description=f"MLflow run of {name}")
            if night:
                night.record(run.mlflow, size)
            run.stopwatch.end("mlflow")
            yield run
            log_metrics(run.mlflow, {f"wall_seconds/{step}": s for step, s in run.stopwatch.seconds.items()}, step=0)
        for directory in run.finished:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _without_trace_of_mistakes(run: Run) -> Iterator[None]:
    """Delete the MLflow run of a mistake that ends the flow before a training has begun."""
    try:
        yield
    except Exception as error:
        if run.mlflow.run_id and not run.began and exit_status(error) is not None:
            try:
                delete_run(run.mlflow)
            except Exception as trouble:
                get_run_logger().warning("MLflow run %s was not deleted: %s", run.mlflow.run_id, trouble)
        raise


def _warn_of_a_slow_device(job: Job) -> None:
    device = job.hardware.device
    if device == "auto" and resolve_device(device).type == "cpu" and job.sources.model_size != "tiny":
        get_run_logger().warning("torch sees no GPU: a %s trains on the CPU", job.sources.model_size)


def _tidy_up(settings: Settings) -> None:
    """Before a run: create the limit tag:gpu if it is missing, and close the MLflow runs of processes that died."""
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        if not is_temporary(client) and ensure_limit(client, gpus := gpu_count()):
            log.warning("this Prefect server had no limit tag:gpu: created, %d task(s) at a time", gpus)
        try:
            for line in reap(settings.tracking_uri, client, HOOK_SECONDS):
                log.info(line)
        except Exception as error:
            log.warning("runs that died were not looked for: %s", error)


def _tags(job: Job) -> dict[str, str]:
    """The MLflow run's tags: which flow run it is of, and which window of rows it takes."""
    start, count = job.prepare.subset_start, job.prepare.subset_count
    tags = {
        FLOW_RUN_TAG: str(flow_run.id),
        ATTEMPT_TAG: str(flow_run.run_count),
        "prefect.deployment": deployment.name or "none",
        "subset": f"{start}:{start + count}" if count else f"{start}:",
    }
    if PREFECT_UI_URL.value():  # the temporary server of `make run` has no pages
        tags["prefect.flow_run_url"] = flow_run.ui_url
        tags["mlflow.note.content"] = f"Prefect: [{flow_run.name}]({flow_run.ui_url})"
    if deployment.name:
        tags |= {"mlflow.source.name": f"{flow_run.flow_name}/{deployment.name}", "mlflow.source.type": "JOB"}
    return tags
