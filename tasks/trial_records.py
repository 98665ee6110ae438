"""What a sweep keeps on the disk: how each trial ended, and the checkpoints of the best one."""

from __future__ import annotations

import math
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.engine.checkpoint import prune_checkpoints
from model.engine.journal import read_journal
from model.engine.median import Curve
from model.engine.trainer import JOURNAL_FILE
from model.files import write_json
from model.records import read_record
from tasks.references import CheckpointRef, SweepRef, TrialOutcome, TrialRef, TrialResult

_STARTED, _OUTCOME = "sweep.json", "outcome.json"


@dataclass(frozen=True)
class Started:
    """What marks a sweep that has been started: an id, which the MLflow runs of its trials have as a tag."""

    id: str


def start_sweep(sweep: SweepRef, log: Any) -> str:
    """The id of a sweep: that of an earlier attempt, or of one that starts now."""
    path = Path(sweep.directory) / _STARTED
    try:
        return read_record(path, Started).id
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s: the trials get new MLflow runs", error)
    started = Started(uuid.uuid4().hex)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(started))
    return started.id


def read_outcome(trial: TrialRef, attempt: str, log: Any) -> TrialOutcome | None:
    """How a trial ended; None if it has not ended yet, or failed in an earlier attempt: memory may suffice now.

    Args:
        attempt: the present attempt of the sweep, by the id of its MLflow run.
    """
    try:
        found = read_record(_path(trial), TrialOutcome)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: the trial is trained again", error)
        return None
    return None if found.outcome == "failed" and found.attempt != attempt else found


def write_outcome(trial: TrialRef, outcome: TrialOutcome) -> None:
    """Record how a trial ended."""
    write_json(_path(trial), asdict(outcome))


def remove_outcome(trial: TrialRef) -> None:
    """Have a trial trained again."""
    _path(trial).unlink()


def _path(trial: TrialRef) -> Path:
    return Path(trial.training.directory) / _OUTCOME


def keep_the_best(sweep: SweepRef, attempt: str, log: Any) -> None:
    """Delete the checkpoints of all trials that have ended, but for the best one."""
    ended = [(trial, read_outcome(trial, attempt, log)) for trial in sweep.trials]
    losses = {
        trial.name: outcome.best_eval_loss
        for trial, outcome in ended
        if outcome and outcome.outcome == "finished" and outcome.best_eval_loss is not None
    }
    best = min(losses, key=lambda name: losses[name], default=None)
    for trial, outcome in ended:
        if outcome and trial.name != best:
            prune_checkpoints(Path(trial.training.directory), keep=set())


def best_of(results: Sequence[TrialResult]) -> TrialResult | None:
    """The finished trial with the lowest validation loss, the first of equal ones; None if no trial has finished."""
    finished = [each for each in results if each.outcome.outcome == "finished"]
    return min(finished, key=lambda each: each.outcome.best_eval_loss or 0.0, default=None)


def ranked(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Finished trials first, then those that were ended early, then failed ones; each by its validation loss."""

    def key(result: TrialResult) -> tuple[int, float]:
        loss = result.outcome.best_eval_loss
        order = ("finished", "ended early", "failed").index(result.outcome.outcome)
        return order, math.inf if loss is None else loss

    return sorted(results, key=key)


def read_curve(trial: TrialRef) -> Curve:
    """The validations of a trial so far, from its journal."""
    training = trial.training
    total = training.config.total_steps(training.tokens.counts["rows"]["train"])
    lines = read_journal(Path(training.directory) / JOURNAL_FILE)
    losses = [(line["step"], line["metrics"]["eval/loss"]) for line in lines if "eval/loss" in line["metrics"]]
    return [(step / max(1, total), loss) for step, loss in losses]


def curves_of_others(
    sweep: SweepRef, trial: TrialRef, attempt: str, log: Any, trained: Collection[str] = ()
) -> list[Curve]:
    """The validations of the other trials that have finished, or were ended early.

    Args:
        trained: names of trials that have no more steps to do, although their outcome may not be recorded yet.
    """

    def has_ended(other: TrialRef) -> bool:
        outcome = read_outcome(other, attempt, log)
        return outcome.outcome != "failed" if outcome else other.name in trained

    return [read_curve(other) for other in sweep.trials if other.name != trial.name and has_ended(other)]


def unfinished(trial: TrialRef, ended_early: bool, reason: str, attempt: str) -> TrialOutcome:
    """The outcome of a trial that was not trained to its end, from its journal.

    Args:
        ended_early: by the median rule; else it failed.
    """
    lines = read_journal(Path(trial.training.directory) / JOURNAL_FILE)
    losses = [(line["metrics"]["eval/loss"], line["step"]) for line in lines if "eval/loss" in line["metrics"]]
    best, step = min(losses, default=(None, 0))
    return TrialOutcome(
        outcome="ended early" if ended_early else "failed",
        reason=reason,
        attempt=attempt,
        steps=lines[-1]["step"] if lines else 0,
        best_step=step,
        best_eval_loss=best,
        base_eval_loss=losses[0][0] if losses else None,
    )


def finished(checkpoint: CheckpointRef, attempt: str) -> TrialOutcome:
    """The outcome of a trial that was trained to its end."""
    return TrialOutcome(
        outcome="finished",
        reason="",
        attempt=attempt,
        steps=checkpoint.steps,
        best_step=checkpoint.best_step,
        best_eval_loss=checkpoint.best_eval_loss,
        base_eval_loss=checkpoint.base_eval_loss,
        resumed_from=checkpoint.resumed_from,
        micro_batch_tokens=checkpoint.micro_batch_tokens,
    )
