"""The MLflow runs of a sweep's trials: one for each trial beneath the sweep's own run, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.engine.trainer import TrainingStoppedError
from ops.machine.process import identify_process
from ops.redaction import redact
from ops.tracking.connection import client
from ops.tracking.runs import (
    PARENT_TAG,
    PROCESS_TAG,
    REASON_TAG,
    RunRef,
    closed_at_end,
    create_run,
    log_metrics,
    log_params,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

SWEEP_TAG = "sweep"  # of a trial's run: the sweep, from its first start to its end
TRIAL_TAG = "sweep.trial"  # of a trial's run: the identity of its training
BEST_TAG = "sweep.best"  # of a sweep's run: the name of its best trial
OUTCOME_TAG = "sweep.outcome"  # of a trial's run: how it ended, for people


@dataclass(frozen=True)
class TrialRun:
    """What identifies and describes the MLflow run of a trial.

    Attributes:
        sweep: id of the sweep; a sweep that is started again has the same, one that begins anew another.
        training: identity of the training.
        name: of the run.
        params: as a run of this training alone would have them.
    """

    sweep: str
    training: str
    name: str
    params: Mapping[str, Any]

    def find(self, tracking_uri: str) -> Run | None:
        """The run that an earlier attempt of the sweep has created; None if there is none."""
        condition = f"tags.`{SWEEP_TAG}` = '{self.sweep}' and tags.`{TRIAL_TAG}` = '{self.training}'"
        return next(search_runs(tracking_uri, condition, ["attributes.start_time ASC"]), None)


@contextmanager
def tracked_trial(parent: RunRef, trial: TrialRun, tags: Mapping[str, str], is_new: bool = False) -> Iterator[RunRef]:
    """Open the run of a trial beneath the sweep's, and close it as ``tracked_run`` does.

    The run of an interrupted attempt is opened again: a trial has one run, however often it is interrupted.

    Args:
        tags: of the run, set anew at each attempt.
        is_new: whether no attempt before can have created the run, so that it need not be looked for.
    """
    mlflow = client(parent.tracking_uri)
    now = {**tags, PARENT_TAG: parent.run_id, PROCESS_TAG: identify_process().to_json()}
    found = None if is_new else trial.find(parent.tracking_uri)
    if found is None:
        own = {SWEEP_TAG: trial.sweep, TRIAL_TAG: trial.training}
        found = create_run(mlflow, parent.experiment_id, trial.name, {**now, **own})
    else:
        adopt(parent, found, now)
        if REASON_TAG in found.data.tags:
            mlflow.delete_tag(found.info.run_id, REASON_TAG)
        mlflow.update_run(found.info.run_id, status="RUNNING")
    ref = RunRef(parent.tracking_uri, found.info.experiment_id, found.info.run_id)
    # A value cannot be logged twice, and the name of the device may be another one now.
    log_params(ref, {name: value for name, value in trial.params.items() if name not in found.data.params})
    with closed_at_end(mlflow, ref.run_id, stops=(TrainingStoppedError,)):
        yield ref


def adopt(parent: RunRef, run: Run, tags: Mapping[str, str]) -> None:
    """Put a trial's run beneath the sweep's present run; each attempt of a sweep has its own.

    Args:
        tags: further tags to set.
    """
    mlflow = client(parent.tracking_uri)
    for key, value in {**tags, PARENT_TAG: parent.run_id}.items():
        if run.data.tags.get(key) != value:
            mlflow.set_tag(run.info.run_id, key, redact(value))


def log_once(run: RunRef, metrics: Mapping[str, float]) -> None:
    """Log metrics at step 0, but for those that an interrupted attempt has logged."""
    there = client(run.tracking_uri).get_run(run.run_id).data.metrics
    log_metrics(run, {name: value for name, value in metrics.items() if name not in there}, step=0)
