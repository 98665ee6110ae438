"""Task ``rank``: compare the trials of a sweep, best first, in MLflow and in Prefect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from ops.text import storable
from ops.tracking.data import log_table
from ops.tracking.runs import RunRef, log_metrics, log_params, set_tags
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from ops.tracking.trials import BEST_TAG
from tasks.references import SweepRef, TrialResult
from tasks.trial_records import best_of, ranked


class NoTrialFinishedError(RuntimeError):
    """Every trial of a sweep diverged, or did not fit into memory."""


# No retries: MLflow's tables grow with each try.
@task(name="rank", cache_policy=NO_CACHE)
@pipeline_step
def rank(run: RunRef, sweep: SweepRef, results: Sequence[TrialResult]) -> TrialResult:
    """Log the table of trials to the sweep's MLflow run, and the parameters of the best one, which the run lacks yet.

    Returns:
        The trial with the lowest validation loss.

    Raises:
        NoTrialFinishedError: there is none.
        NotLoggedError: MLflow could not take all of it.
    """
    ordered = ranked(results)
    best = best_of(results)
    records = [_record(number, each) for number, each in enumerate(ordered, 1)]
    outcomes = [each.outcome.outcome for each in results]
    counts = {
        "sweep/trials": len(results),
        "sweep/ended_early": outcomes.count("ended early"),
        "sweep/failed": outcomes.count("failed"),
    }
    text = storable(trial_report(run, ordered))
    create_markdown_artifact(text, key="trials", description=f"{len(results)} trials, best first")
    with must_be_logged(run.tracking_uri, ordered[0].directory.parent):
        log_table(run, records, "trials")
        log_metrics(run, counts, step=0)
        if best is not None:
            set_tags(run, {BEST_TAG: best.trial.name})
            log_params(run, {name: value for name, value in best.trial.params.items() if name in _unlogged(sweep)})
    if best is None:
        raise NoTrialFinishedError(
            f"no trial was trained to its end: {ordered[0].trial.name} {ordered[0].outcome.describe()}; choose other "
            "values in grid"
        )
    get_run_logger().info("the best of %d trials is %s", len(results), best.trial.name)
    return best


def _unlogged(sweep: SweepRef) -> set[str]:
    """The parameters that the sweep's run has no value of yet: those of the grid, and what follows from them."""
    return {*sweep.trials[0].changes, *sweep.planned}


def _record(number: int, result: TrialResult) -> dict[str, Any]:
    """A line of the table in MLflow."""
    outcome = result.outcome
    return {
        "rank": number,
        "trial": result.trial.name,
        **result.trial.changes,
        "outcome": outcome.outcome,
        "best_eval_loss": outcome.best_eval_loss,
        "best_step": outcome.best_step,
        "steps": outcome.steps,
        "reason": outcome.reason,
        "run_id": result.run.run_id,
    }


def trial_report(run: RunRef, ordered: Sequence[TrialResult]) -> str:
    """The text of Prefect's artifact: each trial with a link to its MLflow run, best first."""
    lines = [f"Trials of MLflow run {run.link}, best first. Losses are nats per response token of validation.", ""]
    lines += ["| | trial | best loss | at step | of steps | outcome | MLflow run |", "|---|---|---|---|---|---|---|"]
    for number, each in enumerate(ordered, 1):
        found = each.outcome
        loss = "" if found.best_eval_loss is None else f"{found.best_eval_loss:.4f}"
        link = f"[{each.run.run_id[:8]}]({each.run.url})" if each.run.url else f"`{each.run.run_id}`"
        said = found.describe().replace("|", "\\|")
        lines.append(
            f"| {number} | {each.trial.name} | {loss} | {found.best_step} | {found.steps} | {said} | {link} |"
        )
    return "\n".join(lines) + "\n"
