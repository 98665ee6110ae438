"""A training and its MLflow run: the journal is sent while it trains, the results when it has ended.

Prefect is not imported here: helpers of a sweep, which need this, start sooner without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from model.engine.patience import early_end
from model.engine.trainer import JOURNAL_FILE, StepReport, TrainResult
from model.engine.training import train as run_training
from model.engine.trunk import TrunkCacheConfig
from model.files import write_json
from model.net.gpt import GPTModel
from ops.machine.stopping import run_stoppable
from ops.tracking.runs import EARLY_END_TAG, RunRef, log_metrics, set_tags
from ops.tracking.shipping import JournalShipper, must_be_logged
from tasks.references import CheckpointRef, TrainingRef
from tasks.resume import begin_attempt, correct_attempt


def train_network(
    network: GPTModel,
    run: RunRef,
    training: TrainingRef,
    cache: TrunkCacheConfig,
    on_step: Callable[[StepReport], None],
    log: Any,
    rest: ExitStack,
    should_end: Callable[[], bool] = lambda: False,
    waits: bool = True,
) -> Callable[[], CheckpointRef]:
    """Train a base that is loaded and frozen as planned; its metrics go to an MLflow run.

    Args:
        log: a logger.
        rest: closing it ends what goes on after the last step: the journal is sent and, unless ``waits``, the last
            checkpoints are written. It raises OSError if one cannot be written.
        should_end: whether to end before the next step for another reason than a signal.
        waits: until the last checkpoints are on disk. If not, the base may be trained again before ``rest`` is
            closed.

    Returns:
        What closes ``rest`` and logs the results; call it once. It raises NotLoggedError as ``train``.

    Raises:
        TrainingStoppedError: ``should_end`` returned true.
        NonFiniteError: as ``train``.
    """

    def finish(wait: Callable[[], None]) -> None:
        if waits:
            wait()
        else:
            rest.callback(wait)

    def work(show: Callable[[StepReport], None], should_stop: Callable[[], bool]) -> TrainResult:
        return run_training(
            network,
            Path(training.tokens.directory),
            training.config,
            Path(training.directory),
            training.identity,
            on_step=show,
            warn=log.warning,
            cache=cache,
            should_stop=lambda: should_stop() or should_end(),
            finish=finish,
        )

    return _log_steps(run, training, work, on_step, log, rest)


def log_training(
    run: RunRef,
    training: TrainingRef,
    work: Callable[[Callable[[StepReport], None], Callable[[], bool]], TrainResult],
    on_step: Callable[[StepReport], None],
    log: Any,
) -> CheckpointRef:
    """Have a training done; its journal goes to an MLflow run meanwhile, and its results in the end.

    Args:
        work: trains, in a thread; called with a listener for steps, and with what it asks whether to stop.
        on_step: called after each step.

    Raises:
        NotLoggedError: as ``train``; and what ``work`` raises.
    """
    with ExitStack() as rest:
        return _log_steps(run, training, work, on_step, log, rest)()


def _log_steps(
    run: RunRef,
    training: TrainingRef,
    work: Callable[[Callable[[StepReport], None], Callable[[], bool]], TrainResult],
    on_step: Callable[[StepReport], None],
    log: Any,
    rest: ExitStack,
) -> Callable[[], CheckpointRef]:
    """The first part of ``log_training``. Returns the second, which closes ``rest`` and logs the results."""
    directory = Path(training.directory)
    # For people who find the directory: it says which base, rows and settings the checkpoints belong to.
    write_json(directory / "training.json", training.determinants)
    announced = begin_attempt(run, directory, log)
    shipper = JournalShipper(run, directory / JOURNAL_FILE)
    shipping = rest.enter_context(shipper.in_background())
    begun: list[int] = []  # the step that the training began after, once it is known

    def show_and_ship(report: StepReport) -> None:
        if not begun:
            begun.append(max(0, report.step - 1))  # a fresh start reports step 0, the validation of the base
            correct_attempt(run, directory, announced, begun[0], log)
        on_step(report)
        shipping.offer(report.step)

    result = run_stoppable(partial(work, show_and_ship))
    if begun:  # of a gang that began again, the result has the checkpoint of the gang before it
        result = replace(result, resumed_from=begun[0])
    total = training.config.total_steps(training.tokens.counts["rows"]["train"])
    ending = early_end(result.steps, total, training.config) if result.steps < total else ""
    log.info(result.trunk)
    if result.resumed_from:
        log.info("this training was resumed at step %d", result.resumed_from)
    log.info("best validation loss %.4f at step %d of %d", result.best_eval_loss, result.best_step, result.steps)
    if ending:
        log.info(ending)

    def finish() -> CheckpointRef:
        rest.close()
        with must_be_logged(run.tracking_uri, directory):
            shipper.finish()
            _log_result(run, result, ending)
            correct_attempt(run, directory, announced, result.resumed_from, log)
        return CheckpointRef.of(directory, result)

    return finish


def _log_result(run: RunRef, result: TrainResult, ending: str) -> None:
    """Log what is known at the end only. A training that was complete already has no first step.

    Args:
        ending: why the training ended early; empty if it did not.
    """
    measured = {
        "train/first_step_seconds": result.first_step_seconds,
        "train/peak_memory_gib": result.peak_memory_bytes / 2**30,
        "train/trunk_hit_share": result.trunk_hit_share,
    }
    log_metrics(run, {name: value for name, value in measured.items() if math.isfinite(value)}, step=0)
    if ending:
        set_tags(run, {EARLY_END_TAG: ending})
