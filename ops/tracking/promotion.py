"""Promotion: whether a new version becomes champion, and how the decision is recorded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from model.evaluation.bootstrap import Improvement, paired_improvement
from ops.machine.lock import exclusive
from ops.machine.lock_file import shared_directory
from ops.notify import notify
from ops.redaction import without_credentials
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.models import put_first
from ops.tracking.registry import CHALLENGER, CHAMPION, finishing_run, shared_name, version_of_alias, version_uri
from ops.tracking.runs import PROMOTION_TAG, RunRef, log_metrics, search_runs, set_tags

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)
MIN_ROWS = 30  # with fewer rows the bootstrap's intervals are too narrow


@dataclass(frozen=True)
class Verdict:
    """The decision about a new version.

    Attributes:
        promoted: whether it becomes champion.
        reason: a sentence.
        improvement: over the model that it was compared with; None where they could not be compared.
        previous: the champion's version before; None if there was none.
    """

    promoted: bool
    reason: str
    improvement: Improvement | None
    previous: str | None


def judge(
    records: Sequence[Mapping[str, Any]],
    rival: Sequence[float] | None,
    rival_name: str,
    previous: str | None,
    margin: float,
    seed: int,
) -> Verdict:
    """Compare a new version's rows with the rival's by the paired bootstrap.

    Args:
        records: the rows of the test split, as ``model.evaluation.records`` gives them.
        rival: its summed loss on each row; None: the run started from it, so that it is the rows' ``base_loss``.
        rival_name: used in the reason.
        previous: the champion's version; None if there is none.
        margin: nats per token that the lower bound of the gain must exceed.
        seed: of the draws.
    """
    tokens = np.array([record["tokens"] for record in records])
    new = np.array([record["loss"] for record in records])
    old = np.array([record["base_loss"] for record in records] if rival is None else rival)
    try:
        gain = paired_improvement(old, new, tokens, seed)
    except ValueError as error:
        return Verdict(False, f"not compared with {rival_name}: {error}", None, previous)
    if gain.rows < MIN_ROWS:
        reason = f"too few rows to tell: {gain.rows} of test were scored, {MIN_ROWS} are needed; raise score_rows or "
        return Verdict(False, reason + "test_share", gain, previous)
    measured = (
        f"the loss on {gain.rows} test rows is {abs(gain.mean):.4f} nats per token "
        f"{'below' if gain.mean > 0 else 'above'} that of {rival_name} "
        f"(gain {gain.lower:.4f} to {gain.upper:.4f} with 90 % confidence)"
    )
    if gain.lower > margin:
        return Verdict(True, f"better: {measured}; at least {margin:g} was asked for", gain, previous)
    if not (old != new).any():
        return Verdict(False, f"no better: on every test row it equals {rival_name}", gain, previous)
    word = "worse" if gain.upper < 0 else "not surely better"
    return Verdict(False, f"{word}: {measured}; at least {margin:g} was asked for", gain, previous)


def settle(run: RunRef, version: ModelVersion, verdict: Verdict) -> Verdict:
    """Write the verdict into registry and run, and give the version its alias.

    If the champion has changed while the version was compared, the new champion stays and the version becomes
    challenger. The call may be repeated.

    Returns:
        The verdict that was written.
    """
    with _promoting(run.tracking_uri, version.name):
        return _settle(run, version, verdict)


def _settle(run: RunRef, version: ModelVersion, verdict: Verdict) -> Verdict:
    mlflow = client(run.tracking_uri)
    current = version_of_alias(mlflow, version.name, CHAMPION)
    number = None if current is None else str(current.version)
    if current is not None and number == str(version.version):  # an earlier call has set the alias already
        reason, previous = current.tags.get("reason", verdict.reason), current.tags.get("previous_champion")
        verdict = Verdict(True, reason, verdict.improvement, None if previous == "none" else previous)
        set_tags(run, {PROMOTION_TAG: CHAMPION, "promotion_reason": reason})
        return verdict
    if verdict.promoted and number != verdict.previous:
        reason = f"the champion became version {number} while this was compared with {verdict.previous}: run it again"
        verdict = Verdict(False, reason, verdict.improvement, number)
    tags = {"reason": verdict.reason}
    if verdict.improvement:
        tags["interval"] = f"{verdict.improvement.lower:.6f} to {verdict.improvement.upper:.6f}"
        measured = {"mean": verdict.improvement.mean, "lower": verdict.improvement.lower}
        log_metrics(run, {f"promotion/{name}": value for name, value in measured.items()}, 0)
    if verdict.promoted:
        tags["promoted_at"] = _now()
        tags["previous_champion"] = verdict.previous or "none"
    for key, value in tags.items():
        mlflow.set_model_version_tag(version.name, str(version.version), key, value)
    word = "Champion" if verdict.promoted else "Challenger"
    put_first(mlflow, version, f"**{word}: {verdict.reason}.**")
    # The alias is set last, so that a champion always has its tags: rollback reads them.
    alias = CHAMPION if verdict.promoted else CHALLENGER
    mlflow.set_registered_model_alias(version.name, alias, str(version.version))
    set_tags(run, {PROMOTION_TAG: alias, "promotion_reason": verdict.reason})
    return verdict


def complete_promotion(tracking_uri: str, name: str) -> str | None:
    """Give the champion's run the tag of its promotion, if it was killed between the alias and the tag.

    The ledger would not count the run's rows, and the next night would train its champion on them again.

    Returns:
        The id of the run that got the tag; None if nothing was missing.
    """
    with _promoting(tracking_uri, name):
        mlflow = client(tracking_uri)
        version = version_of_alias(mlflow, name, CHAMPION)
        if version is None or "promoted_at" not in version.tags:  # none, or made champion by hand
            return None
        run_id = finishing_run(version)
        # Searched for, because a run that was deleted must not get a tag: deleting it frees its rows.
        run = next((run for run in search_runs(tracking_uri, f"attributes.run_id = '{run_id}'")), None)
        if run is None or PROMOTION_TAG in run.data.tags:
            return None
        ref = RunRef(tracking_uri, run.info.experiment_id, run_id)
        set_tags(ref, {PROMOTION_TAG: CHAMPION, "promotion_reason": version.tags["reason"]})
        return run_id


@contextmanager
def _promoting(tracking_uri: str, name: str) -> Iterator[None]:
    """Hold the promotions of a model on this machine, so that the champion does not change meanwhile."""
    directory = shared_directory(Settings.load().device_locks)
    with exclusive(directory, shared_name(tracking_uri, f"promotion of {name}"), "another promotion", _log.info):
        yield


def announce(run: RunRef, version: ModelVersion, verdict: Verdict) -> None:
    """Send a notice of the verdict."""
    title = f"{version_uri(version)} is {'champion' if verdict.promoted else 'refused: the champion stays'}"
    lines = [verdict.reason]
    if verdict.promoted and verdict.previous:
        lines.append(f"before: version {verdict.previous}; `make rollback` returns to it")
    notify(title, lines, {"MLflow run": run.url})


def roll_back(tracking_uri: str, name: str) -> tuple[str, str]:
    """Return a registered model's champion to its predecessor.

    Returns:
        The version that was champion, and the one that is now.

    Raises:
        LookupError: there is no champion, or no version before it.
    """
    with _promoting(tracking_uri, name):
        return _roll_back(tracking_uri, name)


def _roll_back(tracking_uri: str, name: str) -> tuple[str, str]:
    from mlflow.exceptions import MlflowException

    mlflow = client(tracking_uri)
    current = version_of_alias(mlflow, name, CHAMPION)
    if current is None:
        raise LookupError(
            f"{name} has no champion at {without_credentials(tracking_uri)}: if its runs are on another server, "
            "set MLFLOW_TRACKING_URI"
        )
    previous = current.tags.get("previous_champion")
    if previous is None:
        raise LookupError(
            f"{version_uri(current)} was made champion by hand: which version it replaced is not known. Set the "
            "alias champion to another version on the model's page in MLflow"
        )
    if previous == "none":
        raise LookupError(
            f"{version_uri(current)} is the first champion: there is none before it. To have none at all, remove the "
            "alias on its page in MLflow; nights then stop, until a run with start_from=base makes a champion again"
        )
    try:
        mlflow.get_model_version(name, previous)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise LookupError(
            f"the champion before {version_uri(current)} was version {previous}, which is no longer registered: set "
            "the alias champion to another version on its page in MLflow"
        ) from error
    mlflow.set_model_version_tag(name, str(current.version), "rolled_back_at", _now())
    mlflow.set_registered_model_alias(name, CHAMPION, previous)
    return str(current.version), previous


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
