"""One attempt of a training: exact token normalisation, validation, checkpoints, resumption."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from model.data.tokens import CodeAlpacaDataset, epoch_order
from model.engine.checkpoint import FoundCheckpoint, checkpoint_path
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.flops import matmul_ceiling
from model.engine.patience import ran_out
from model.engine.ranks import Ranks
from model.engine.scoring import mean_loss, perplexity, row_losses
from model.engine.speed import Speed
from model.engine.state import CheckpointRecord, TrainingState
from model.engine.stepper import PendingStep, Stepper, build_optimizer, learning_rate_at
from model.engine.training_files import TrainingFiles
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.engine.trunk_filling import fill_together
from model.engine.trunk_sharing import trunk_outputs
from model.net.device import peak_memory

JOURNAL_FILE = "metrics.jsonl"
_LAG = 4  # steps queued ahead on a GPU: the host reads a step's loss when so many later ones are queued

_ceiling = functools.cache(matmul_ceiling)  # measured once per process, device and dtype


@dataclass(frozen=True)
class StepReport:
    """Progress after a step, for ``on_step``.

    Attributes:
        step: optimizer steps done; 0 for the validation of the base.
        total_steps: optimizer steps of the whole training.
        loss: training loss of the step; NaN at step 0.
        tokens_per_second: real tokens per second over the last steps; 0 at step 0.
        eta_seconds: seconds to the end of the training, estimated; NaN at step 0.
        eval_loss: validation loss in nats per response token; None at a step without validation.
    """

    step: int
    total_steps: int
    loss: float
    tokens_per_second: float
    eta_seconds: float
    eval_loss: float | None


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished training.

    Attributes:
        best: directory of the checkpoint with the lowest validation loss; it may be that of step 0, the base.
        best_step: step of that checkpoint.
        best_eval_loss: validation loss of that checkpoint, in nats per response token.
        base_eval_loss: validation loss of the base, in nats per response token.
        steps: optimizer steps done.
        resumed_from: step at which this process resumed the training; 0 for a fresh start.
        micro_batch_tokens: tokens per pass, about, at the end of the training.
        first_step_seconds: seconds from the start of the last attempt to the end of its first step; NaN without one.
        peak_memory_bytes: as ``model.net.device.peak_memory``, the highest of all ranks.
        trunk: where the trunk's outputs were kept, as a line for the log.
        trunk_hit_share: share of the tokens whose trunk output was in the cache when it was needed; with several
            ranks of the tokens of this rank, and outputs computed ahead count as computed when needed.
    """

    best: Path
    best_step: int
    best_eval_loss: float
    base_eval_loss: float
    steps: int
    resumed_from: int
    micro_batch_tokens: int
    first_step_seconds: float
    peak_memory_bytes: int
    trunk: str
    trunk_hit_share: float


class TrainingStoppedError(Exception):
    """The training stopped because the caller requested it; a checkpoint of the last step, if any, was saved."""


class NonFiniteError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the model is unchanged since the step before."""


@dataclass(frozen=True)
class Call:
    """What all attempts of one call of ``train`` share.

    Attributes:
        tokens, config, directory, identity, on_step, warn, cache, should_stop, ranks, finish: arguments of ``train``.
        resumed_from: step of the checkpoint that the first attempt started from; 0 without one.
    """

    tokens: Path
    config: TrainConfig
    directory: Path
    identity: str
    on_step: Callable[[StepReport], None]
    warn: Callable[[str], None]
    cache: TrunkCacheConfig
    should_stop: Callable[[], bool]
    ranks: Ranks
    finish: Callable[[Callable[[], None]], None]
    resumed_from: int


class Trainer:
    """One attempt of a training, from a checkpoint or from the base.

    Args:
        engine: of the model to train.
        call: what the attempts share.
        micro_batch_tokens: tokens per pass, about.
        found: the checkpoint to resume from; None for a fresh start.
    """

    def __init__(self, engine: Engine, call: Call, micro_batch_tokens: int, found: FoundCheckpoint | None):
        self.begun = time.perf_counter()
        self.first_step_seconds = math.nan
        self.engine, self.call, self.config, self.ranks = engine, call, call.config, call.ranks
        self.micro_batch_tokens = micro_batch_tokens
        self.fresh = found is None
        self.rows = CodeAlpacaDataset(call.tokens, "train", prompt_loss_weight=self.config.prompt_loss_weight)
        self.validation_rows = CodeAlpacaDataset(call.tokens, "validation", limit=self.config.eval_rows)
        self.total_steps = self.config.total_steps(len(self.rows))
        self.steps_per_epoch = math.ceil(len(self.rows) / self.config.batch_size)
        self.optimizer = build_optimizer(engine.model, self.config)
        self.trunk, self.validation_trunk = self._trunk_outputs()
        self.stepper = Stepper(
            engine, self.optimizer, self.rows, self.trunk, self.config, micro_batch_tokens, self.ranks
        )
        self.files = TrainingFiles(
            call.directory, JOURNAL_FILE, engine.model, self.optimizer, self.stepper.tensors(), self.ranks
        )
        self.state = self._restore(found)
        self.ceiling = _ceiling(engine.device, engine.dtype) * self.ranks.world
        self.speed = Speed()
        self.pending: deque[PendingStep] = deque()
        self.stop_asked: Callable[[], bool] = lambda: False

    def _trunk_outputs(self) -> tuple[TrunkOutputs, TrunkOutputs]:
        """The trunk's outputs for the training rows and for the validation rows, as far as the limits allow."""
        epochs = self.total_steps / self.steps_per_epoch
        validations = 2 + self.total_steps // self.config.eval_freq
        order = epoch_order(len(self.rows), self.config.seed, 0)
        engine, size, cache = self.engine, self.micro_batch_tokens, self.call.cache
        training = trunk_outputs(engine, self.rows, order, size, epochs, cache, ranks=self.ranks)
        order = np.arange(len(self.validation_rows))
        return training, trunk_outputs(
            engine, self.validation_rows, order, size, validations, cache, training.bytes_kept, self.ranks
        )

    def _restore(self, found: FoundCheckpoint | None) -> TrainingState:
        """Load the checkpoint and cut the journal back to it; without one, start at step 0 with an empty journal."""
        world = self.ranks.world
        state = TrainingState(self.call.identity, self.micro_batch_tokens, world=world)
        if found:
            state = TrainingState.from_json(found.state, self.micro_batch_tokens, world)
            before = CheckpointRecord.model_validate(found.state).world
            if before != world:
                self.call.warn(
                    f"the checkpoint of step {state.step} is of a training on {before} ranks, and it goes on with "
                    f"{world}: the results are the same but for rounding"
                )
        self.files.restore(found, state.journal_lines)
        return state

    def run(self) -> TrainResult:
        """Train to the last step.

        Raises:
            TrainingStoppedError, NonFiniteError: as ``train``.
        """
        self.engine.model.train()
        try:
            with self.files:
                self.train()
                result = self.result()  # what it reads may belong to another training as soon as files are closed
                self.call.finish(self.files.close())
        except (TrainingStoppedError, NonFiniteError):  # raised on all ranks
            self.ranks.barrier()  # the last checkpoint is on disk: a launcher may end all ranks once one of them ends
            raise
        self.ranks.barrier()
        return result

    def train(self) -> None:
        """Validate the base, then queue and report all steps."""
        fill_together(self.validation_trunk, np.arange(len(self.validation_rows)), self.check_stop)
        if self.fresh:
            self.call.on_step(StepReport(0, self.total_steps, math.nan, 0.0, math.nan, self.validate()))
        fill_together(self.trunk, self.rows_to_come(), self.check_stop)
        self.speed.restart()
        for rows in self.batches(self.state.step):
            if ran_out(self.state.step, self.state.best_step, self.config):
                break
            if self.should_stop():
                self.stop()
            self.step(rows)
            self.report_finished_steps()

    def batches(self, step: int) -> Iterator[np.ndarray[Any, Any]]:
        """The rows of each step from ``step`` to the last."""
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for number in range(step, self.total_steps):
            epoch, position = divmod(number, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(self.rows), self.config.seed, epoch), epoch
            yield order[position * self.config.batch_size : (position + 1) * self.config.batch_size]

    def rows_to_come(self) -> np.ndarray[Any, Any]:
        """All rows of the steps that are left."""
        # Two epochs of steps, wherever they begin, contain a whole epoch.
        batches = list(islice(self.batches(self.state.step), 2 * self.steps_per_epoch))
        return np.unique(np.concatenate(batches)) if batches else np.empty(0, dtype=np.int64)

    def check_stop(self) -> None:
        """End the training before its first step in this process, if it should stop; all ranks call it.

        Raises:
            TrainingStoppedError: it should; on all ranks. There has been no step since the last checkpoint.
        """
        if self.ranks.agree(self.call.should_stop()):
            raise TrainingStoppedError(f"stopped on request before step {self.state.step + 1} of {self.total_steps}")

    def should_stop(self) -> bool:
        """Whether the training ends before the next step, on all ranks.

        Several ranks ask before each step, and act on the common answer one step later: no rank waits for another.
        """
        asked = self.call.should_stop()
        if self.ranks.world == 1:
            return asked
        before, self.stop_asked = self.stop_asked, self.ranks.agree_later(asked)
        return before()

    def step(self, rows: np.ndarray[Any, Any]) -> None:
        """Queue one optimizer step."""
        learning_rate = learning_rate_at(self.state.step, self.total_steps, self.config)
        self.pending.append(self.stepper.step(self.state.step, rows, learning_rate))
        self.state.step += 1

    def report_finished_steps(self) -> None:
        """Report pending steps: on a GPU those more than ``_LAG`` steps old, and before a validation all of them."""
        evaluate = self.state.step % self.config.eval_freq == 0 or self.state.step == self.total_steps
        while len(self.pending) > (0 if evaluate or self.engine.device.type != "cuda" else _LAG):
            self.report(evaluate and len(self.pending) == 1)

    def report(self, evaluate: bool) -> None:
        """Write the oldest pending step to the journal and hand it to the caller.

        Args:
            evaluate: validate first; the step is the newest one, too.

        Raises:
            NonFiniteError: its loss or gradient is not finite.
        """
        done = self.pending.popleft()
        result = done.read()
        if result.stopped:
            self.optimizer.zero_grad()
            self.stepper.complete_state()
            other = "" if self.config.precision == "fp32" else " or use precision=fp32"
            raise NonFiniteError(
                f"loss {result.loss} with gradient norm {result.grad_norm} at step {done.step}: stopped before the "
                f"update; lower learning_rate (now {self.config.learning_rate:g}){other}"
            )
        if math.isnan(self.first_step_seconds):
            self.first_step_seconds = time.perf_counter() - self.begun
        self.speed.add(done.tokens, done.flops)
        self.files.append(
            done.step,
            {
                "train/loss": result.loss,
                "train/lr": done.learning_rate,
                **({"train/grad_norm": result.grad_norm} if math.isfinite(result.grad_norm) else {}),
                "train/tokens_per_second": self.speed.tokens_per_second,
                "train/mfu": self.speed.flops_per_second / self.ceiling,
                **result.scaling,
            },
        )
        eval_loss = self.validate() if evaluate else None
        eta = (self.total_steps - done.step) * self.speed.seconds_per_step
        speed = self.speed.tokens_per_second
        self.call.on_step(StepReport(done.step, self.total_steps, result.loss, speed, eta, eval_loss))

    def validate(self) -> float:
        """Score the validation rows and save a checkpoint. Returns nats per response token.

        Raises:
            NonFiniteError: the loss is not finite; no checkpoint is saved.
            TrainingStoppedError: as ``check_stop``, in the base's validation. Any later one comes to its end, as its
                step has no checkpoint yet.
        """
        state = self.state
        check = self.check_stop if state.step == 0 else lambda: None
        rows, trunk = self.validation_rows, self.validation_trunk
        scores = row_losses(self.engine, rows, self.micro_batch_tokens, trunk, self.ranks, check)
        loss = mean_loss(*scores)
        if not math.isfinite(loss):
            self.stepper.complete_state()
            raise NonFiniteError(f"validation loss is {loss} at step {state.step}: lower the learning rate")
        if state.step == 0:
            state.base_eval_loss = loss
        if loss < state.best_eval_loss:
            state.best_eval_loss, state.best_step = loss, state.step
        self.files.append(state.step, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
        self.save()
        self.speed.restart()
        return loss

    def save(self) -> None:
        """Save a checkpoint of the current step; only it and the best one are kept.

        Raises:
            RanksDifferError: as ``Stepper.check_ranks``.
        """
        self.state.journal_lines = self.files.journal_lines
        keep = {self.state.best_step, self.state.step}
        self.stepper.check_ranks(self.state.step)  # before complete_state, which overwrites what is compared
        self.stepper.complete_state()
        self.files.save(self.state.step, self.state.to_json(), keep)

    def stop(self) -> None:
        """Report all pending steps, save a checkpoint of the last one, and end the training.

        Raises:
            TrainingStoppedError: always.
        """
        while self.pending:
            self.report(evaluate=False)
        self.save()
        self.files.wait()
        raise TrainingStoppedError(f"stopped on request after step {self.state.step} of {self.total_steps}")

    def result(self) -> TrainResult:
        """The result after the last step."""
        state = self.state
        return TrainResult(
            best=checkpoint_path(self.call.directory, state.best_step),
            best_step=state.best_step,
            best_eval_loss=state.best_eval_loss,
            base_eval_loss=state.base_eval_loss,
            steps=state.step,
            resumed_from=self.call.resumed_from,
            micro_batch_tokens=self.micro_batch_tokens,
            first_step_seconds=self.first_step_seconds,
            peak_memory_bytes=self.ranks.highest(peak_memory(self.engine.device)),
            trunk=self.trunk.describe(),
            trunk_hit_share=self.trunk.hit_share,
        )
