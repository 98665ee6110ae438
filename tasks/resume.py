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
_FILE = "attempt.json"  # of a training: who trains it, or did last


class _Attempt(BaseModel):
    """The last attempt of a training.

    Attributes:
        run_id: its MLflow run.
        step: of the checkpoint that it began with; 0 without one.
        made_by: the MLflow run that saved that checkpoint; empty if it is not known.
    """

    run_id: str
    step: int = -1  # of a note by an earlier version: before any checkpoint
    made_by: str = ""


def begin_attempt(run: RunRef, directory: Path, log: Any) -> int:
    """Say where a training resumes, if it does, and note that this run trains it now.

    Returns:
        The step of the checkpoint; 0 if the training starts from the base.
    """
    step = newest_step(directory)
    before = _read(directory)
    # An attempt that was killed before it saved a checkpoint has left that of an earlier one.
    made_by = before.run_id if step > before.step else before.made_by
    if step and made_by == run.run_id:  # a second try of the task: the run goes on from itself, no news to it
        log.info("resuming at step %d, from the checkpoint of the try before", step)
    elif step:
        shown = f"MLflow run {made_by}" if made_by else "an earlier run"
        log.info("resuming at step %d, from the checkpoint of %s", step, shown)
        _tag(run, f"step {step} of {shown}", log)
    _write(directory, _Attempt(run_id=run.run_id, step=step, made_by=made_by if step else ""))
    return step


def correct_attempt(run: RunRef, directory: Path, announced: int, resumed: int, log: Any) -> None:
    """Correct note and tag if the newest checkpoint was damaged, and the training resumed at an earlier one.

    Args:
        announced: the step that ``begin_attempt`` returned.
        resumed: the step that the training went on from.
    """
    if resumed != announced:
        _write(directory, _Attempt(run_id=run.run_id, step=resumed))
        _tag(run, f"step {resumed}", log)


def _tag(run: RunRef, text: str, log: Any) -> None:
    try:
        set_tags(run, {RESUMED_TAG: text})
    except Exception as error:  # a training goes on while MLflow is away
        log.warning("MLflow run %s has no tag %s: %s", run.run_id, RESUMED_TAG, error)


def describe_kept(directory: Path) -> str:
    """What an interrupted training keeps, and how it goes on."""
    step = newest_step(directory)
    if not step:
        return "stopped before the first checkpoint: the same parameters start the training again"
    return f"stopped: a checkpoint of step {step} is kept, and a run with the same parameters goes on from there"


def _read(directory: Path) -> _Attempt:
    """The attempt before; one of an unknown run if there was none, or its note is damaged."""
    try:
        return read_record(directory / _FILE, _Attempt)
    except (OSError, ValueError):
        return _Attempt(run_id="")


def _write(directory: Path, attempt: _Attempt) -> None:
    write_json(directory / _FILE, attempt.model_dump())
