"""Says which interrupted training a run goes on with, and what an interruption keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.engine.checkpoint import newest_step
from model.files import write_json
from model.records import read_record
from ops.tracking.runs import RunRef, set_tags

RESUMED_TAG = "resumed_from"  # of an MLflow run: the step and the run that it goes on from
_FILE = "attempt.json"  # of a training: the MLflow run that trains it, or did last


class _Attempt(BaseModel):
    """The MLflow run of an attempt."""

    run_id: str


def begin_attempt(run: RunRef, directory: Path, log: Any) -> int:
    """Say where a training resumes, if it does, and note that this run trains it now.

    Returns:
        The step of the checkpoint; 0 if the training starts from the base.
    """
    step = newest_step(directory)
    if step:
        earlier = _earlier_run(directory)
        if earlier == run.run_id:  # a second try of the task: the run goes on from itself, which is no news to it
            log.info("resuming at step %d, from the checkpoint of the try before", step)
            return step
        shown = f"MLflow run {earlier}" if earlier else "an earlier run"
        log.info("resuming at step %d, from the checkpoint of %s", step, shown)
        try:
            set_tags(run, {RESUMED_TAG: f"step {step} of {shown}"})
        except Exception as error:  # a training goes on while MLflow is away
            log.warning("MLflow run %s has no tag %s: %s", run.run_id, RESUMED_TAG, error)
    write_json(directory / _FILE, _Attempt(run_id=run.run_id).model_dump())
    return step


def correct_attempt(run: RunRef, announced: int, resumed: int) -> None:
    """Correct the tag if the newest checkpoint was damaged, and the training resumed at an earlier one."""
    if resumed != announced:
        set_tags(run, {RESUMED_TAG: f"step {resumed}"})


def describe_kept(directory: Path) -> str:
    """What an interrupted training keeps, and how it goes on."""
    step = newest_step(directory)
    if not step:
        return "stopped before the first checkpoint: the same parameters start the training again"
    return f"stopped: a checkpoint of step {step} is kept, and a run with the same parameters goes on from there"


def _earlier_run(directory: Path) -> str:
    """The id of the MLflow run of the attempt before; empty if it is not known."""
    try:
        return read_record(directory / _FILE, _Attempt).run_id
    except (OSError, ValueError):
        return ""
