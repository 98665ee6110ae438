"""The training loop: exact token normalisation, warm-up and cosine, validation, checkpoints, resumption."""

from __future__ import annotations

import functools
import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.data.packing import Pack, pack, split_evenly
from model.data.tokens import CodeAlpacaDataset, epoch_order
from model.engine.checkpoint import CheckpointWriter, checkpoint_path, load_checkpoint, newest_checkpoint
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.flops import matmul_ceiling, necessary_flops
from model.engine.journal import MetricsJournal
from model.engine.scoring import head_loss, mean_loss, padded_head, perplexity, row_losses
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.net.device import give_memory_back, let_memory_grow, peak_memory, ran_out_of_memory, resolve_precision
from model.net.gpt import GPTModel

JOURNAL_FILE = "metrics.jsonl"
_FEWEST_TOKENS = 1_024  # of a pass that is chosen for want of memory
_LAG = 4  # steps a GPU may be behind: the host reads a step's loss only when the next ones are queued


@dataclass(frozen=True)
class StepReport:
    """What a caller may show after each step."""

    step: int
    total_steps: int
    loss: float
    tokens_per_second: float
    eta_seconds: float
    eval_loss: float | None


@dataclass(frozen=True)
class TrainResult:
    """Where a finished training lies.

    Attributes:
        best: checkpoint with the lowest validation loss (step 0, the base itself, takes part).
        best_step: its step.
        best_eval_loss, base_eval_loss: nats per response token.
        steps: optimizer steps done.
        resumed_from: step at which this process took over; 0 for a fresh start.
        micro_batch_tokens: tokens per pass in the end.
        first_step_seconds: from the call to the end of this process's first step.
        peak_memory_bytes: as model.device.peak_memory.
        trunk: where the trunk's outputs were kept, for people.
        trunk_hit_share: tokens whose trunk output was there when it was needed, over all.
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
    """The caller asked to stop; a checkpoint of the last step is there to go on from."""


class NonFiniteError(ArithmeticError):
    """Loss or gradient became NaN or infinite; the model is as it was before that step."""


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to zero (Loshchilov & Hutter 2017).

    Args:
        step: 0 for the first optimizer step.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: GPTModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters only; decay on those of two dimensions, none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The fused kernel alone can leave a step out without the host's word: see _Stepper.
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), fused=True)


def default_micro_batch_tokens(model: GPTModel) -> int:
    """Tokens per pass: on a GPU as many as a quarter of its memory holds the activations of, 32,768 at most.

    Some 40 bytes x D are kept per token and trained block. On a CPU 2,048: more is no faster.
    """
    device = model.wte.weight.device
    if device.type != "cuda":
        return 2_048
    kept = 40 * model.config.n_embd * max(1, model.config.n_layer - model.num_frozen)
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(_FEWEST_TOKENS, min(32_768, int(memory / 4 / kept) // 1_024 * 1_024))


def train(
    model: GPTModel,
    tokens: Path,
    config: TrainConfig,
    directory: Path,
    identity: str,
    on_step: Callable[[StepReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda message: None,
    cache: TrunkCacheConfig = TrunkCacheConfig(),  # noqa: B008
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train a frozen-and-cast model, resuming from ``directory`` where an earlier try got to.

    The loss of a step is the sum over all its target tokens divided once by their number (their weight,
    with a prompt_loss_weight), however the rows fall into micro-batches. Order, dropout and schedule depend on
    seed and step alone and are restored with the checkpoint: a resumed training equals an uninterrupted one
    bit for bit on the same hardware and versions.

    Where a GPU's memory does not hold a pass, the training goes on from its last checkpoint with passes half as long,
    and so does one that resumes it. That rounds differently, and draws other dropout.

    Args:
        model: on its device, frozen parameters cast; trained in place.
        tokens: directory written by ``model.data.preparing.prepare``.
        config: hyper-parameters.
        directory: of this training alone: checkpoints ``step-*`` and the journal ``metrics.jsonl``.
        identity: sha256 over everything that determines the training; a checkpoint of another is ignored.
        on_step: called after every step and validation, in order; on a GPU a few steps late. Steps repeated after
            memory ran out are reported again.
        warn: told of damaged checkpoints, and of passes that memory did not hold.
        cache: where the frozen blocks' outputs may be kept; a matter of speed only.
        should_stop: asked between steps; true ends the training there, to be resumed later.

    Raises:
        TrainingStoppedError: should_stop was true; a checkpoint of that very step was saved.
        NonFiniteError: no later step changed the model, and no checkpoint holds it.
        ValueError: an unknown precision.
        torch.OutOfMemoryError: memory does not hold the shortest passes either.
    """
    device = model.wte.weight.device
    dtype = resolve_precision(config.precision, device)
    if model.ln_f.weight.dtype == torch.float64:
        dtype = torch.float64  # proofs of sameness
    model.set_dropout(config.dropout)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
        let_memory_grow(device)
        torch.cuda.reset_peak_memory_stats(device)
    tokens_per_pass = config.micro_batch_tokens or default_micro_batch_tokens(model)
    resumed_from: int | None = None
    while True:
        found = newest_checkpoint(directory, identity, warn)
        if found:
            tokens_per_pass = min(tokens_per_pass, found[1].get("micro_batch_tokens", tokens_per_pass))
        if resumed_from is None:
            resumed_from = int(found[1]["step"]) if found else 0
        engine = Engine(model, dtype)
        try:
            result = _train(
                engine, tokens, config, directory, identity, on_step, warn, cache, should_stop, tokens_per_pass, found
            )
            return replace(result, resumed_from=resumed_from)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            trouble = ". ".join(str(error).split(". ")[:2])  # that memory ran out, and what for
            if _FEWEST_TOKENS < engine.latest_tokens < tokens_per_pass:
                tokens_per_pass = engine.latest_tokens  # no pass need be as long as it may be
            if tokens_per_pass <= _FEWEST_TOKENS:
                raise torch.OutOfMemoryError(
                    f"memory does not hold passes of {tokens_per_pass:,} tokens (micro_batch_tokens): end what "
                    f"else is in it, lower num_unfrozen_layers or trunk_cache_gb, or take a smaller model ({trouble})"
                ) from error
        # Not above: the error holds on to all that the failed try had made.
        fewer = max(_FEWEST_TOKENS, tokens_per_pass // 2)
        noise = " but for the noise of dropout" if config.dropout else ""
        warn(
            f"memory does not hold passes of {tokens_per_pass:,} tokens: going on from the last checkpoint with "
            f"{fewer:,} (micro_batch_tokens), which changes no step{noise} ({trouble})"
        )
        tokens_per_pass = fewer
        del engine
        model.zero_grad(set_to_none=True)
        gc.collect()
        give_memory_back()


def _train(
    engine: Engine,
    tokens: Path,
    config: TrainConfig,
    directory: Path,
    identity: str,
    on_step: Callable[[StepReport], None],
    warn: Callable[[str], None],
    cache: TrunkCacheConfig,
    should_stop: Callable[[], bool],
    micro_batch_tokens: int,
    found: tuple[Path, dict[str, Any]] | None,
) -> TrainResult:
    """One try of ``train``, with passes of about ``micro_batch_tokens``, from the checkpoint that was found."""
    begun = time.perf_counter()
    model, device = engine.model, engine.device
    train_rows = CodeAlpacaDataset(tokens, "train", prompt_loss_weight=config.prompt_loss_weight)
    validation = CodeAlpacaDataset(tokens, "validation", limit=config.eval_rows)
    total_steps = config.total_steps(len(train_rows))
    steps_per_epoch = math.ceil(len(train_rows) / config.batch_size)
    optimizer = build_optimizer(model, config)
    trunk = TrunkOutputs(
        engine,
        train_rows,
        epoch_order(len(train_rows), config.seed, 0),
        micro_batch_tokens,
        total_steps / steps_per_epoch,
        cache,
    )
    validation_trunk = TrunkOutputs(
        engine,
        validation,
        np.arange(len(validation)),
        micro_batch_tokens,
        2 + total_steps // config.eval_freq,
        cache,
        beside=trunk.bytes_kept,
    )
    stepper = _Stepper(engine, optimizer, train_rows, trunk, config, micro_batch_tokens)
    directory.mkdir(parents=True, exist_ok=True)
    journal = MetricsJournal(directory / JOURNAL_FILE)
    torch.manual_seed(config.seed)

    if found:
        path, state = found
        load_checkpoint(path, model, optimizer)
        step = resumed_from = int(state["step"])
        base_loss, best_step, best_loss = state["base_eval_loss"], state["best_step"], state["best_eval_loss"]
        journal.truncate(state["journal_lines"])
    else:
        step = resumed_from = best_step = 0
        base_loss = best_loss = math.inf
        journal.truncate(0)

    ceiling = _ceiling(device, engine.dtype)
    speed = _Speed()
    pending: deque[_PendingStep] = deque()
    first_step_seconds = math.nan

    def validate() -> float:
        nonlocal best_loss, best_step, base_loss
        loss = mean_loss(*row_losses(engine, validation, micro_batch_tokens, validation_trunk))
        if not math.isfinite(loss):
            raise NonFiniteError(f"validation loss is {loss} at step {step}: lower the learning rate")
        if step == 0:
            base_loss = loss
        if loss < best_loss:
            best_loss, best_step = loss, step
        journal.append(step, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
        save()
        speed.restart()
        return loss

    def save() -> None:
        state = {
            "identity": identity,
            "base_eval_loss": base_loss,
            "best_eval_loss": best_loss,
            "best_step": best_step,
            "journal_lines": journal.lines,
            "micro_batch_tokens": micro_batch_tokens,
        }
        writer.save(step, state, keep={best_step, step})

    def report(evaluate: bool) -> None:
        """Write the oldest pending step down; ``evaluate``: it is the newest too, and validation follows."""
        nonlocal first_step_seconds
        done = pending.popleft()
        loss, grad_norm = done.read()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(
                f"loss {loss} with gradient norm {grad_norm} at step {done.step}: stopped before the update; "
                f"lower learning_rate (now {config.learning_rate:g}) or use precision=fp32"
            )
        if math.isnan(first_step_seconds):
            first_step_seconds = time.perf_counter() - begun
        speed.add(done.tokens, done.flops)
        journal.append(
            done.step,
            {
                "train/loss": loss,
                "train/lr": done.learning_rate,
                "train/grad_norm": grad_norm,
                "train/tokens_per_second": speed.tokens_per_second,
                "train/mfu": speed.flops_per_second / ceiling,
            },
        )
        eval_loss = validate() if evaluate else None
        eta = (total_steps - done.step) * speed.seconds_per_step
        on_step(StepReport(done.step, total_steps, loss, speed.tokens_per_second, eta, eval_loss))

    model.train()
    with CheckpointWriter(directory, model, optimizer) as writer:
        if not found:
            on_step(StepReport(0, total_steps, math.nan, 0.0, math.nan, validate()))
        speed.restart()
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        while step < total_steps:
            if should_stop():
                while pending:
                    report(evaluate=False)
                save()
                writer.wait()
                raise TrainingStoppedError(f"stopped on request after step {step} of {total_steps}")
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(train_rows), config.seed, epoch), epoch
            rows = order[position * config.batch_size : (position + 1) * config.batch_size]
            pending.append(stepper.step(step, rows, learning_rate_at(step, total_steps, config)))
            step += 1
            evaluate = step % config.eval_freq == 0 or step == total_steps
            while len(pending) > (0 if evaluate or device.type != "cuda" else _LAG):
                report(evaluate and len(pending) == 1)
    return TrainResult(
        best=checkpoint_path(directory, best_step),
        best_step=best_step,
        best_eval_loss=best_loss,
        base_eval_loss=base_loss,
        steps=step,
        resumed_from=resumed_from,
        micro_batch_tokens=micro_batch_tokens,
        first_step_seconds=first_step_seconds,
        peak_memory_bytes=peak_memory(device),
        trunk=trunk.describe(),
        trunk_hit_share=trunk.hit_share,
    )


_ceiling = functools.cache(matmul_ceiling)  # a process need not measure its device twice


class _PendingStep:
    """A step that was queued: what the host knows of it, and what it will read when the device is done."""

    def __init__(self, step: int, learning_rate: float, tokens: int, flops: float, results: torch.Tensor):
        self.step = step
        self.learning_rate = learning_rate
        self.tokens = tokens
        self.flops = flops
        self.results = results
        self.done: torch.cuda.Event | None = None
        if results.is_cuda:
            self.results = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
            self.results.copy_(results, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm before clipping."""
        if self.done is not None:
            self.done.synchronize()
        loss, grad_norm = self.results.tolist()
        return loss, grad_norm


class _Stepper:
    """Optimizer steps, queued without waiting for the device."""

    def __init__(
        self,
        engine: Engine,
        optimizer: torch.optim.AdamW,
        dataset: CodeAlpacaDataset,
        trunk: TrunkOutputs,
        config: TrainConfig,
        micro_batch_tokens: int,
    ):
        self.engine = engine
        self.optimizer = optimizer
        self.dataset = dataset
        self.trunk = trunk
        self.config = config
        self.micro_batch_tokens = micro_batch_tokens
        self.trained = [p for p in engine.model.parameters() if p.requires_grad]
        self.head = engine.model.lm_head.weight
        self.frozen_head = None if self.head.requires_grad else padded_head(self.head, engine.dtype)
        # Fused AdamW leaves a step out where this is 1, as GradScaler has it do: the model stays as it was
        # before the first step that was not finite, although the host learns of it some steps later.
        self.stopped = torch.zeros((), device=engine.device)
        optimizer.found_inf = self.stopped  # type: ignore[attr-defined]

    def step(self, step: int, rows: np.ndarray[Any, Any], learning_rate: float) -> _PendingStep:
        """One optimizer step over ``rows``; ``step`` counts from 0."""
        engine, config = self.engine, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        lengths = self.dataset.lengths[rows, 0]
        weight = self.dataset.loss_weight(rows)
        computed = self.trunk.computed
        loss = torch.zeros((), device=engine.device, dtype=torch.float64)
        norm = torch.zeros((), device=engine.device, dtype=torch.float64)
        targets = 0
        if weight > 0:  # else there is nothing to learn, and nothing to divide by (trl#6668)
            head = self.frozen_head if self.frozen_head is not None else padded_head(self.head, engine.dtype)
            head_gradient = torch.zeros_like(self.head) if self.head.requires_grad else None
            first = True
            for part in split_evenly(rows, lengths, self.micro_batch_tokens):
                batch = pack(self.dataset, part, engine.device)
                targets += len(batch.targets)
                if not len(batch.targets):
                    continue

                def loss_of(hidden: torch.Tensor, batch: Pack = batch) -> tuple[torch.Tensor, torch.Tensor]:
                    total, gradient = head_loss(
                        hidden, head, self.head.size(0), batch.targets, batch.weights, head_gradient
                    )
                    return total / weight, gradient / weight

                loss += engine.forward_backward(self.trunk(batch), batch, loss_of, first)
                first = False
            if head_gradient is not None:
                head_gradient /= weight
                self.head.grad = head_gradient if self.head.grad is None else self.head.grad + head_gradient
            norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
            self.stopped.logical_or_(~(torch.isfinite(loss) & torch.isfinite(norm)))
            self.optimizer.step()
            if engine.keeps_gradients:
                self.head.grad = None  # is not the engine's
            else:
                self.optimizer.zero_grad()
        flops = necessary_flops(
            engine.model.config,
            engine.model.num_frozen,
            int(lengths.sum()) - len(lengths),
            targets,
            self.trunk.computed - computed,
            self.head.requires_grad,
        )
        return _PendingStep(step + 1, learning_rate, int(lengths.sum()), flops, torch.stack([loss, norm.double()]))


class _Speed:
    """Useful tokens (no padding) and necessary operations per second over the last steps, validations excluded."""

    def __init__(self, window: int = 20):
        self.steps: deque[tuple[int, float, float]] = deque(maxlen=window)
        self.restart()

    def restart(self) -> None:
        """Start the clock of the next step now."""
        self.since = time.perf_counter()

    def add(self, tokens: int, flops: float) -> None:
        now = time.perf_counter()
        self.steps.append((tokens, flops, now - self.since))
        self.since = now

    @property
    def seconds_per_step(self) -> float:
        return sum(seconds for *_, seconds in self.steps) / len(self.steps) if self.steps else math.nan

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for tokens, *_ in self.steps) / sum(seconds for *_, seconds in self.steps)

    @property
    def flops_per_second(self) -> float:
        return sum(flops for _, flops, _ in self.steps) / sum(seconds for *_, seconds in self.steps)
