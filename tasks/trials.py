"""Task ``train_trials`` (tag gpu): train the trials of a sweep in turn, or go on with an interrupted sweep."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.engine.checkpoint import MODEL_FILE, load_state, prune_checkpoints
from model.engine.journal import read_journal
from model.engine.median import Curve, is_unpromising, median_of_others
from model.engine.scoring import perplexity
from model.engine.trainer import JOURNAL_FILE, NonFiniteError, StepReport, TrainingStoppedError
from model.engine.trunk import TrunkCacheConfig
from model.engine.trunk_sharing import SharedTrunks
from model.files import sha256_json, write_json
from model.net.config import GPTConfig
from model.net.device import resolve_device, resolve_precision
from model.net.freezing import plan_freeze
from model.records import read_record
from ops.settings import Settings
from ops.text import one_line
from ops.tracking.runs import RunRef, client, set_tags
from ops.tracking.shipping import JournalShipper, must_be_logged
from ops.tracking.steps import pipeline_step
from ops.tracking.trials import OUTCOME_TAG, TrialRun, adopt, log_once, tracked_trial
from tasks.config import TrialConfig
from tasks.frozen import ReusableBase
from tasks.progress import Progress
from tasks.references import CheckpointRef, ModelRef, SweepRef, TokensRef, TrialOutcome, TrialRef, TrialResult
from tasks.train import identify_training, is_worth_a_retry, train_network

_STARTED, _OUTCOME = "sweep.json", "outcome.json"
_REASON = 300  # characters of an error's message
# Tags of the sweep's MLflow run that its trials have too: hooks and watcher find them by the flow run.
_INHERITED = ("prefect.", "mlflow.source.", "mlflow.note.content", "data_sha256", "subset")


@dataclass(frozen=True)
class Started:
    """What marks a sweep that has been started: an id, which the MLflow runs of its trials have as a tag."""

    id: str


def identify_sweep(
    tokens: TokensRef, model: ModelRef, trials: Sequence[TrialConfig], device: str, end_early: bool
) -> SweepRef:
    """Plan and identify the training of each trial.

    Args:
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: a model has fewer blocks than a trial trains.
    """
    shape = GPTConfig(**model.config)
    trainings = [
        identify_training(tokens, model, plan_freeze(shape, trial.freeze), trial.train, device) for trial in trials
    ]
    identity = sha256_json({"trainings": [each.identity for each in trainings], "end_early": end_early})
    directory = Settings.load().trainings / f"sweep-{identity}"
    refs = tuple(
        TrialRef(
            trial.name,
            trial.changes,
            trial.params,
            replace(each, directory=str(directory / f"trial-{number:03d}")),
        )
        for number, (trial, each) in enumerate(zip(trials, trainings, strict=True), 1)
    )
    return SweepRef(identity, str(directory), refs, end_early)


@task(
    name="train_trials",
    tags=["gpu"],
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=is_worth_a_retry,
    cache_policy=NO_CACHE,
)
@pipeline_step
def train_trials(run: RunRef, sweep: SweepRef, device: str, trunk_cache_gb: float) -> list[TrialResult]:
    """Train each trial of a sweep, or go on where an interrupted attempt of the sweep stopped.

    The base is loaded once, and the outputs of its frozen blocks are computed once. A trial is trained bit for bit as
    if it were alone. A trial that diverges, or that memory does not hold, is a result; the others go on.

    The caller holds the device and the sweep.

    Args:
        run: the sweep's MLflow run; that of each trial is beneath it.

    Returns:
        The results, in the order of the trials.

    Raises:
        NotLoggedError: a trial is finished, and MLflow could not take its metrics.
    """
    log = get_run_logger()
    place = resolve_device(device)
    shared = TrunkCacheConfig(Settings.load().trunk_outputs, int(trunk_cache_gb * 1e9), SharedTrunks())
    tags = client(run.tracking_uri).get_run(run.run_id).data.tags
    progress = Progress(log)
    work = _Sweep(
        run=run,
        sweep=sweep,
        id=_started(Path(sweep.directory), log),
        tags={name: value for name, value in tags.items() if name.startswith(_INHERITED)},
        base=ReusableBase(place),
        cache=shared,
        progress=progress,
        log=log,
    )
    with progress.courier:
        results = work.train_all()
        while (best := best_of(results)) and work.is_damaged(best):
            results = work.train_all()
    return results


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


def _started(directory: Path, log: Any) -> str:
    """The id of a sweep that an earlier attempt has started; else of one that starts now."""
    path = directory / _STARTED
    try:
        return read_record(path, Started).id
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s: the trials get new MLflow runs", error)
    started = Started(uuid.uuid4().hex)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(started))
    return started.id


@dataclass
class _Sweep:
    """A sweep under way.

    Attributes:
        run: its MLflow run.
        id: as ``Started``.
        tags: of the MLflow run of each trial.
        curves: validations of the trials that have ended, for the median rule.
    """

    run: RunRef
    sweep: SweepRef
    id: str
    tags: dict[str, str]
    base: ReusableBase
    cache: TrunkCacheConfig
    progress: Progress
    log: Any
    curves: list[Curve] = field(default_factory=list)

    def train_all(self) -> list[TrialResult]:
        """Train what has not ended yet; of the checkpoints, only those of the best trial so far are kept."""
        self.curves.clear()
        results: list[TrialResult] = []
        for number, trial in enumerate(self.sweep.trials):
            self.progress.begin_part(trial.name, number, len(self.sweep.trials))
            result = self.train_one(trial)
            results.append(result)
            if result.outcome.outcome != "failed":
                self.curves.append(read_curve(trial))
            best = best_of(results)
            for each in results:
                if each is not best and each.outcome.outcome != "failed":
                    prune_checkpoints(each.directory, keep=set())
            loss = result.outcome.best_eval_loss
            shown = "" if loss is None else f", best validation loss {loss:.4f} at step {result.outcome.best_step}"
            self.log.info("trial %s %s%s", trial.name, result.outcome.describe(), shown)
        return results

    def train_one(self, trial: TrialRef) -> TrialResult:
        """Train a trial, or find what an earlier attempt has made of it."""
        path = Path(trial.training.directory) / _OUTCOME
        recorded = self._recorded(path)
        of_mlflow = TrialRun(self.id, trial.training.identity, trial.name, trial.params)
        if recorded and (found := of_mlflow.find(self.run.tracking_uri)) and found.info.status == "FINISHED":
            adopt(self.run, found, self.tags)
            ref = RunRef(self.run.tracking_uri, found.info.experiment_id, found.info.run_id)
            return TrialResult(trial, ref, recorded)
        try:
            with tracked_trial(self.run, of_mlflow, self.tags) as ref:
                outcome = recorded or self._train(ref, trial)
                if not recorded:
                    write_json(path, asdict(outcome))
                self._log(ref, trial, outcome)
        except (
            NonFiniteError,
            torch.OutOfMemoryError,
        ) as error:  # not recorded: memory may suffice later
            self._drop_outputs()
            outcome = self._failure(trial, error)
            set_tags(ref, {OUTCOME_TAG: outcome.describe()})
        return TrialResult(trial, ref, outcome)

    def is_damaged(self, best: TrialResult) -> bool:
        """Whether the checkpoint of the best trial is damaged; then its record is removed: it is trained again."""
        try:
            load_state(Path(best.checkpoint.best), [MODEL_FILE])
        except ValueError as error:
            self.log.warning("%s: trial %s is trained again", error, best.trial.name)
            (best.directory / _OUTCOME).unlink()
            return True
        return False

    def _recorded(self, path: Path) -> TrialOutcome | None:
        try:
            return read_record(path, TrialOutcome)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.log.warning("%s: the trial is trained again", error)
            return None

    def _train(self, ref: RunRef, trial: TrialRef) -> TrialOutcome:
        training = trial.training
        dtype = resolve_precision(training.config.precision, self.base.device)
        network = self.base.get(training.model, training.plan, dtype)
        rule = _MedianRule(read_curve(trial), self.curves) if self.sweep.end_early else None

        def on_step(report: StepReport) -> None:
            self.progress.show(report)
            if rule and report.eval_loss is not None:
                rule.add(report.step / max(1, report.total_steps), report.eval_loss)

        try:
            checkpoint = train_network(
                network, ref, training, self.cache, on_step, lambda: rule is not None and rule.ends
            )
        except TrainingStoppedError:
            if rule is None or not rule.ends:
                raise
            return replace(_so_far(trial), outcome="ended early", reason=rule.reason)
        return _finished(checkpoint)

    def _log(self, ref: RunRef, trial: TrialRef, outcome: TrialOutcome) -> None:
        """Log what a run of this training alone would log about it, and how it ended."""
        with must_be_logged(ref.tracking_uri, Path(trial.training.directory)):
            JournalShipper(ref, Path(trial.training.directory) / JOURNAL_FILE).finish()
            found = {
                "best/eval_loss": outcome.best_eval_loss,
                "best/step": outcome.best_step,
                "base/eval_loss": outcome.base_eval_loss,
                "base/perplexity": None if outcome.base_eval_loss is None else perplexity(outcome.base_eval_loss),
            }
            log_once(ref, {name: value for name, value in found.items() if value is not None})
            set_tags(ref, {OUTCOME_TAG: outcome.describe()})

    def _failure(self, trial: TrialRef, error: Exception) -> TrialOutcome:
        return replace(_so_far(trial), outcome="failed", reason=one_line(error)[:_REASON])

    def _drop_outputs(self) -> None:
        if self.cache.shared is not None:
            self.cache.shared.clear()


class _MedianRule:
    """The median rule for one trial.

    Args:
        curve: its validations so far, of an interrupted attempt.
        others: those of the trials that have ended.
    """

    def __init__(self, curve: Curve, others: Sequence[Curve]):
        self.curve, self.others = list(curve), list(others)
        self.reason = ""
        self._look()

    @property
    def ends(self) -> bool:
        """Whether the trial is to end now."""
        return bool(self.reason)

    def add(self, share: float, loss: float) -> None:
        """Take a validation into account.

        Args:
            share: of the trial's steps that are done.
            loss: in nats per response token.
        """
        self.curve.append((share, loss))
        self._look()

    def _look(self) -> None:
        if self.curve and self.curve[-1][0] < 1 and is_unpromising(self.curve, self.others):
            best = min(loss for _, loss in self.curve)
            self.reason = (
                f"after {self.curve[-1][0]:.0%} of its steps the best validation loss, {best:.4f}, was worse than "
                f"the median of the others, {median_of_others(self.curve, self.others):.4f}"
            )


def read_curve(trial: TrialRef) -> Curve:
    """The validations of a trial so far, from its journal."""
    training = trial.training
    total = training.config.total_steps(training.tokens.counts["rows"]["train"])
    lines = read_journal(Path(training.directory) / JOURNAL_FILE)
    return [
        (line["step"] / max(1, total), line["metrics"]["eval/loss"])
        for line in lines
        if "eval/loss" in line["metrics"]
    ]


def _so_far(trial: TrialRef) -> TrialOutcome:
    """What the journal of a trial says that was not trained to its end."""
    lines = read_journal(Path(trial.training.directory) / JOURNAL_FILE)
    losses = [(line["metrics"]["eval/loss"], line["step"]) for line in lines if "eval/loss" in line["metrics"]]
    best, step = min(losses, default=(None, 0))
    base = losses[0][0] if losses else None
    return TrialOutcome("failed", "", lines[-1]["step"] if lines else 0, step, best, base)


def _finished(checkpoint: CheckpointRef) -> TrialOutcome:
    return TrialOutcome(
        outcome="finished",
        reason="",
        steps=checkpoint.steps,
        best_step=checkpoint.best_step,
        best_eval_loss=checkpoint.best_eval_loss,
        base_eval_loss=checkpoint.base_eval_loss,
        resumed_from=checkpoint.resumed_from,
        micro_batch_tokens=checkpoint.micro_batch_tokens,
    )
