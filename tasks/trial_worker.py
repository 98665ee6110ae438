"""One process's part in a sweep: it takes the next trial that nobody has, trains it, and records how it ended."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from model.engine.median import Curve, is_unpromising, median_of_others
from model.engine.scoring import perplexity
from model.engine.trainer import JOURNAL_FILE, NonFiniteError, StepReport, TrainingStoppedError
from model.engine.trunk_sharing import SharedTrunks
from model.files import read_bytes, write_json
from model.net.device import resolve_device, resolve_precision
from ops.machine.flock import hold_file
from ops.text import one_line
from ops.tracking.runs import RunRef, set_tags
from ops.tracking.shipping import JournalShipper, must_be_logged
from ops.tracking.trials import OUTCOME_TAG, TrialRun, adopt, log_once, tracked_trial
from tasks.frozen import ReusableBase, trunk_cache
from tasks.progress_lines import ProgressLines
from tasks.references import SweepRef, TrialOutcome, TrialRef, TrialResult
from tasks.training import train_network
from tasks.trial_finishing import Finishing, Stages
from tasks.trial_records import (
    curves_of_others,
    finished,
    keep_the_best,
    read_curve,
    read_outcome,
    remove_outcome,
    unfinished,
    write_outcome,
)

_REASON = 300  # characters of an error's message


@dataclass(frozen=True)
class Order:
    """What all processes of a sweep are told.

    Attributes:
        run: the sweep's MLflow run.
        sweep: the trials.
        id: of the sweep, from its first start to its end.
        tags: of the MLflow run of each trial.
        holder, flow_run_id: name and id of the flow run, for those who wait for a device.
        trunk_cache_gb: limit of the frozen blocks' outputs, for each process.
        places: devices by the names of their locks, any of which a helper may take.
    """

    run: RunRef
    sweep: SweepRef
    id: str
    tags: dict[str, str]
    holder: str
    flow_run_id: str
    trunk_cache_gb: float
    places: dict[str, str]


class TrialWorker:
    """Trains trials on one device. The base stays loaded, and the outputs of its frozen blocks are kept.

    While the last checkpoint of a trial is written, and MLflow takes its results, the next trial trains.

    Args:
        order: of the sweep.
        device: that this process holds.
        progress: shows the steps of each trial.
        log: a logger.
        should_stop: whether to end before the next step.
    """

    def __init__(
        self,
        order: Order,
        device: str,
        progress: ProgressLines,
        log: Any,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.order, self.progress, self.log, self.should_stop = order, progress, log, should_stop
        self.attempt = order.run.run_id
        self.base = ReusableBase(resolve_device(device))
        self.shared = SharedTrunks()
        self.ended: dict[str, TrialResult] = {}
        self.trained: set[str] = set()  # names of trials whose steps are done
        self.finishing = Finishing(log)
        self.cache = trunk_cache(order.trunk_cache_gb, self.shared)

    def work(self) -> list[TrialResult]:
        """Train every trial that no other process has, in their order.

        Returns:
            The results of all trials that have ended by then.

        Raises:
            TrainingStoppedError: should_stop returned true.
            NotLoggedError: a trial is finished, and MLflow could not take its metrics.
        """
        trials = self.order.sweep.trials
        with self.finishing:
            for number, trial in enumerate(trials):
                if trial.name not in self.ended:
                    self.finishing.follow(self._take(number, trial))
            self.finishing.wait()
        return [self.ended[trial.name] for trial in trials if trial.name in self.ended]

    def train_again(self, trial: TrialRef) -> None:
        """Forget how a trial ended."""
        remove_outcome(trial)
        del self.ended[trial.name]
        self.trained.discard(trial.name)

    def _take(self, number: int, trial: TrialRef) -> Generator[None]:
        """Train a trial unless another process has it, or find what an earlier attempt has made of it.

        Yields once, when its steps are done and the device is free. Another thread may do the rest.
        """
        with claimed(trial) as is_mine:
            if is_mine:
                self.progress.begin_part(trial.name, number, len(self.order.sweep.trials))
                self.ended[trial.name] = yield from self._train(trial)

    def _train(self, trial: TrialRef) -> Generator[None, None, TrialResult]:
        stages = Stages()
        recorded = read_outcome(trial, self.attempt, self.log)
        of_mlflow = TrialRun(self.order.id, trial.training.identity, trial.name, trial.params)
        parent = self.order.run
        if recorded and (found := of_mlflow.find(parent.tracking_uri)) and recorded.fits(found.info.status):
            adopt(parent, found, self.order.tags)
            ref = RunRef(parent.tracking_uri, found.info.experiment_id, found.info.run_id)
            return TrialResult(trial, ref, recorded)
        try:
            # A trial that is given up after its steps waits for its checkpoints too: the next attempt writes there.
            is_new = _make_directory(trial)
            with tracked_trial(parent, of_mlflow, self.order.tags, is_new) as ref, ExitStack() as rest:
                if recorded is None:
                    finish = self._do_steps(ref, trial, stages, rest)
                    yield
                    outcome = finish()
                else:
                    outcome = recorded
                write_outcome(trial, outcome)
                self._log_outcome(ref, trial, outcome)
        except (NonFiniteError, torch.OutOfMemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.shared.clear()
            outcome = unfinished(trial, False, one_line(error)[:_REASON], self.attempt)
            write_outcome(trial, outcome)
            set_tags(ref, {OUTCOME_TAG: outcome.describe()})
        keep_the_best(self.order.sweep, self.attempt, self.log)
        loss = outcome.best_eval_loss
        shown = "" if loss is None else f", best validation loss {loss:.4f} at step {outcome.best_step}"
        self.log.info("trial %s %s%s%s", trial.name, outcome.describe(), shown, stages.describe())
        return TrialResult(trial, ref, outcome)

    def _do_steps(self, ref: RunRef, trial: TrialRef, stages: Stages, rest: ExitStack) -> Callable[[], TrialOutcome]:
        """Do the steps of a trial. Returns what waits for its last checkpoint and logs its results.

        Args:
            rest: as for ``train_network``.
        """
        training = trial.training
        dtype = resolve_precision(training.config.precision, self.base.device)
        if not self.base.has(training.model, training.plan, dtype):
            self.shared.clear()  # it refers to the base that is dropped now
        network = self.base.get(training.model, training.plan, dtype)
        rule = None
        if self.order.sweep.end_early:
            rule = MedianRule(read_curve(trial), lambda: self._curves_of_others(trial))

        def on_step(report: StepReport) -> None:
            self.progress.show(report)
            if report.step:
                stages.end_step()
            if rule and report.eval_loss is not None:
                rule.add(report.step / max(1, report.total_steps), report.eval_loss)

        def should_end() -> bool:
            return self.should_stop() or self.finishing.has_failed or (rule is not None and rule.ends)

        try:
            finish = train_network(network, ref, training, self.cache, on_step, self.log, rest, should_end, False)
        except TrainingStoppedError:
            if rule is None or not rule.ends:
                raise
            reason = rule.reason
            self.trained.add(trial.name)
            rest.close()
            return lambda: unfinished(trial, True, reason, self.attempt)
        self.trained.add(trial.name)
        return lambda: finished(finish(), self.attempt)

    def _curves_of_others(self, trial: TrialRef) -> list[Curve]:
        return curves_of_others(self.order.sweep, trial, self.attempt, self.log, self.trained)

    def _log_outcome(self, ref: RunRef, trial: TrialRef, outcome: TrialOutcome) -> None:
        """Log what a run of this training alone would log about it, and how it ended."""
        with must_be_logged(ref.tracking_uri, Path(trial.training.directory)):
            JournalShipper(ref, Path(trial.training.directory) / JOURNAL_FILE).finish()
            found = {
                "best/eval_loss": outcome.best_eval_loss,
                "best/step": outcome.best_step,
                "untuned/eval_loss": outcome.base_eval_loss,
                "untuned/perplexity": None if outcome.base_eval_loss is None else perplexity(outcome.base_eval_loss),
            }
            log_once(ref, {name: value for name, value in found.items() if value is not None})
            set_tags(ref, {OUTCOME_TAG: outcome.describe()})


class MedianRule:
    """The median rule for one trial.

    Args:
        curve: its validations so far, of an interrupted attempt.
        others: reads those of the trials that have ended.
    """

    def __init__(self, curve: Curve, others: Callable[[], Sequence[Curve]]):
        self.curve, self.others = list(curve), others
        self.reason = ""
        self._look()

    @property
    def ends(self) -> bool:
        """Whether the trial is to end now."""
        return bool(self.reason)

    def add(self, share: float, loss: float) -> None:
        """Take a validation into account.

        A training that goes on from a checkpoint reports later validations again: they replace those of before.

        Args:
            share: of the trial's steps that are done.
            loss: in nats per response token.
        """
        self.curve = [*(each for each in self.curve if each[0] < share), (share, loss)]
        self._look()

    def _look(self) -> None:
        if not self.curve or self.curve[-1][0] >= 1:
            return
        others = self.others()
        if is_unpromising(self.curve, others):
            best = min(loss for _, loss in self.curve)
            self.reason = (
                f"after {self.curve[-1][0]:.0%} of its steps the best validation loss, {best:.4f}, was worse than "
                f"the median of the others, {median_of_others(self.curve, others):.4f}"
            )


def _make_directory(trial: TrialRef) -> bool:
    """Make a trial's directory; attempts do so before they create an MLflow run. Returns whether it is new."""
    try:
        Path(trial.training.directory).mkdir(parents=True)
    except FileExistsError:
        return False
    return True


@contextmanager
def claimed(trial: TrialRef) -> Iterator[bool]:
    """Hold a trial against the other processes of its sweep. Yields whether this process has it."""
    directory = Path(trial.training.directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with hold_file(directory.with_suffix(".lock"), wait=False) as stream:
        yield stream is not None


def write_order(path: Path, order: Order) -> None:
    """Write an order as JSON."""
    write_json(path, TypeAdapter(Order).dump_python(order, mode="json"))


def read_order(path: Path) -> Order:
    """What ``write_order`` wrote.

    Raises:
        ValueError: it is damaged.
    """
    return TypeAdapter(Order).validate_json(read_bytes(path))
