"""The training loop: exact token normalisation, warm-up and cosine, validation, checkpoints, resumption."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from model.device import autocast, resolve_precision
from model.gpt import GPTModel
from model.journal import MetricsJournal
from model.scoring import mean_loss, perplexity, row_losses, weighted_loss_sum
from model.tokens import CodeAlpacaDataset, collate_fn, epoch_order, micro_batches

JOURNAL_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of a training.

    Attributes:
        epochs: passes over the training rows.
        max_steps: stop after this many optimizer steps, if that is sooner.
        batch_size: rows per optimizer step; micro-batches never change the step.
        micro_batch_tokens: padded tokens per forward and backward pass; None chooses by device.
        learning_rate: peak of the schedule.
        weight_decay: on matrices only, not on biases and norms.
        warmup_ratio: share of the steps over which the learning rate rises from 0.
        max_grad_norm: gradients are scaled down to this global norm.
        prompt_loss_weight: weight of the loss on prompt tokens, in training only.
        dropout: rate in the trained blocks.
        eval_freq: steps between validations, each of which also saves a checkpoint.
        eval_rows: validation rows scored at most; None for all.
        precision: auto, bf16 or fp32.
        seed: of the order of rows and of dropout.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_tokens: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    prompt_loss_weight: float = 0.0
    dropout: float = 0.0
    eval_freq: int = 100
    eval_rows: int | None = 1000
    precision: str = "auto"
    seed: int = 42

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole training over ``rows`` rows."""
        steps = self.epochs * math.ceil(rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


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
        last: checkpoint of the last step.
        best_step: its step.
        best_eval_loss, base_eval_loss: nats per response token.
        steps: optimizer steps done.
        resumed_from: step at which this process took over; 0 for a fresh start.
    """

    best: Path
    last: Path
    best_step: int
    best_eval_loss: float
    base_eval_loss: float
    steps: int
    resumed_from: int


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
    fused = model.wte.weight.is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), fused=fused)


def default_micro_batch_tokens(device: torch.device) -> int:
    """Padded tokens per pass: 16,384 on a GPU of 40 GB or more, 4,096 on a smaller one, 2,048 on a CPU.

    The logits decide: some 0.7 of the tokens x V x 10 bytes, 6 GB at 16,384.
    """
    if device.type != "cuda":
        return 2_048
    return 16_384 if torch.cuda.get_device_properties(device).total_memory > 39e9 else 4_096


def train(
    model: GPTModel,
    tokens: Path,
    config: TrainConfig,
    directory: Path,
    identity: str,
    on_step: Callable[[StepReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda message: None,
) -> TrainResult:
    """Train a frozen-and-cast model, resuming from ``directory`` where an earlier try got to.

    The loss of a step is the sum over all its target tokens divided once by their number (their weight,
    with a prompt_loss_weight), however the rows fall into micro-batches. Order, dropout and schedule depend on
    seed and step alone and are restored with the checkpoint: a resumed training equals an uninterrupted one
    bit for bit on the same hardware and versions.

    Args:
        model: on its device, frozen parameters cast; trained in place.
        tokens: directory written by ``model.tokens.prepare``.
        config: hyper-parameters.
        directory: of this training alone: checkpoints ``step-*`` and the journal ``metrics.jsonl``.
        identity: sha256 over everything that determines the training; a checkpoint of another is ignored.
        on_step: called after every step and validation.
        warn: told of damaged checkpoints.

    Raises:
        NonFiniteError: before the optimizer step that would have spread it; no checkpoint holds it.
        ValueError: an unknown precision.
    """
    device = model.wte.weight.device
    dtype = resolve_precision(config.precision, device)
    model.set_dropout(config.dropout)
    micro_batch_tokens = config.micro_batch_tokens or default_micro_batch_tokens(device)
    train_rows = CodeAlpacaDataset(tokens, "train", prompt_loss_weight=config.prompt_loss_weight)
    validation = CodeAlpacaDataset(tokens, "validation", limit=config.eval_rows)
    total_steps = config.total_steps(len(train_rows))
    steps_per_epoch = math.ceil(len(train_rows) / config.batch_size)
    optimizer = build_optimizer(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    directory.mkdir(parents=True, exist_ok=True)
    journal = MetricsJournal(directory / JOURNAL_FILE)
    torch.manual_seed(config.seed)

    found = newest_checkpoint(directory, identity, warn)
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

    speed = _Speed()

    def validate() -> float:
        nonlocal best_loss, best_step, base_loss
        loss = mean_loss(*row_losses(model, validation, dtype, micro_batch_tokens))
        if not math.isfinite(loss):
            raise NonFiniteError(f"validation loss is {loss} at step {step}: lower the learning rate")
        if step == 0:
            base_loss = loss
        if loss < best_loss:
            best_loss, best_step = loss, step
        journal.append(step, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})
        state = {
            "identity": identity,
            "base_eval_loss": base_loss,
            "best_eval_loss": best_loss,
            "best_step": best_step,
            "journal_lines": journal.lines,
        }
        save_checkpoint(directory, model, optimizer, step, state)
        prune_checkpoints(directory, keep={best_step, step})
        speed.restart()
        return loss

    model.train()
    if not found:
        on_step(StepReport(0, total_steps, math.nan, 0.0, math.nan, validate()))
    while step < total_steps:
        epoch, position = divmod(step, steps_per_epoch)
        order = epoch_order(len(train_rows), config.seed, epoch)
        rows = order[position * config.batch_size : (position + 1) * config.batch_size]
        lr = learning_rate_at(step, total_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, grad_norm = _step(model, optimizer, trained, train_rows, rows, config, dtype, micro_batch_tokens, step)
        step += 1
        speed.add(int(train_rows.lengths[rows, 0].sum()))
        journal.append(
            step,
            {
                "train/loss": loss,
                "train/lr": lr,
                "train/grad_norm": grad_norm,
                "train/tokens_per_second": speed.tokens_per_second,
            },
        )
        eval_loss = validate() if step % config.eval_freq == 0 or step == total_steps else None
        eta = (total_steps - step) * speed.seconds_per_step
        on_step(StepReport(step, total_steps, loss, speed.tokens_per_second, eta, eval_loss))
    return TrainResult(
        best=checkpoint_path(directory, best_step),
        last=checkpoint_path(directory, step),
        best_step=best_step,
        best_eval_loss=best_loss,
        base_eval_loss=base_loss,
        steps=step,
        resumed_from=resumed_from,
    )


def _step(
    model: GPTModel,
    optimizer: torch.optim.Optimizer,
    trained: list[torch.nn.Parameter],
    dataset: CodeAlpacaDataset,
    rows: np.ndarray[Any, Any],
    config: TrainConfig,
    dtype: torch.dtype,
    micro_batch_tokens: int,
    step: int,
) -> tuple[float, float]:
    """One optimizer step over ``rows``; returns loss and gradient norm before clipping."""
    device = model.wte.weight.device
    weight = dataset.loss_weight(rows)
    if weight == 0:
        return 0.0, 0.0  # no target: nothing to learn, and nothing to divide by (trl#6668)
    loss = torch.zeros((), device=device, dtype=torch.float64)
    for group in micro_batches(dataset.lengths[rows, 0].tolist(), micro_batch_tokens):
        batch = {key: value.to(device) for key, value in collate_fn([dataset[rows[i]] for i in group]).items()}
        with autocast(device, dtype):
            part = weighted_loss_sum(model, batch) / weight
        part.backward()
        loss += part.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"loss {loss.item()} with gradient norm {grad_norm.item()} at step {step + 1}: stopped before "
            f"the update; lower learning_rate (now {config.learning_rate:g}) or use precision=fp32"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), grad_norm.item()


class _Speed:
    """Useful tokens (no padding) per second over the last steps, validations and saves excluded."""

    def __init__(self, window: int = 20):
        self.steps: deque[tuple[int, float]] = deque(maxlen=window)
        self.restart()

    def restart(self) -> None:
        """Start the clock of the next step now."""
        self.since = time.perf_counter()

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        self.steps.append((tokens, now - self.since))
        self.since = now

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for tokens, _ in self.steps) / sum(seconds for _, seconds in self.steps)

    @property
    def seconds_per_step(self) -> float:
        return sum(seconds for _, seconds in self.steps) / len(self.steps) if self.steps else math.nan
