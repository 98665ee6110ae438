"""One optimizer step: schedule, optimizer, gradients accumulated over passes, clipping and update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Pack, deal, pack, split_evenly
from model.data.tokens import CodeAlpacaDataset
from model.engine.adamw import AdamW, ParameterGroup
from model.engine.config import TrainConfig
from model.engine.digests import check_equal
from model.engine.engine import Engine
from model.engine.flops import necessary_flops
from model.engine.loss import head_loss, padded_head
from model.engine.loss_scale import LEAST, LossScale
from model.engine.ranks import ALONE, Ranks
from model.engine.shards import Shards
from model.engine.trunk import TrunkOutputs
from model.net.gpt import GPTModel


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


def build_optimizer(model: GPTModel, config: TrainConfig) -> AdamW:
    """AdamW over the trainable parameters only, with weight decay on matrices, and none on biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = ParameterGroup([p for p in trained if p.dim() >= 2], config.weight_decay)
    others = ParameterGroup([p for p in trained if p.dim() < 2], weight_decay=0.0)
    return AdamW([matrices, others], config.learning_rate)


@dataclass(frozen=True)
class StepResult:
    """What the device computed in a step.

    Attributes:
        loss: mean over the step's target tokens, in nats.
        grad_norm: gradient norm before clipping; infinite or NaN if the step was skipped.
        stopped: whether this step, or one before it, ended the training because a number was not finite.
        scaling: metrics of the loss scale in fp16; empty in other dtypes.
    """

    loss: float
    grad_norm: float
    stopped: bool
    scaling: dict[str, float]


class PendingStep:
    """A step queued on the device: its known numbers, and its results once the device has computed them.

    Args:
        step: number of the step, from 1.
        learning_rate: of this step.
        tokens: real tokens of its rows, padding not counted.
        flops: necessary floating-point operations.
        results: loss, gradient norm before clipping, whether the training is stopped and, in fp16, the loss scale
            and the number of steps skipped so far, (3,) or (5,), float64, on the device.
    """

    def __init__(self, step: int, learning_rate: float, tokens: int, flops: float, results: Tensor):
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

    def read(self) -> StepResult:
        """The results; waits until the device has computed them."""
        if self.done is not None:
            self.done.synchronize()
        loss, grad_norm, stopped, *scaling = self.results.tolist()
        names = ("train/loss_scale", "train/skipped_steps")
        return StepResult(loss, grad_norm, bool(stopped), dict(zip(names, scaling, strict=False)))


class Stepper:
    """Queues optimizer steps without waiting for the device.

    Args:
        engine: of the model that trains.
        optimizer: ``build_optimizer`` of that model.
        dataset: training rows.
        trunk: the trunk's outputs for these rows.
        config: hyper-parameters.
        micro_batch_tokens: tokens per pass, about.
        ranks: processes that train together: each computes the gradients of some rows of a step, and updates a part
            of the parameters.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: AdamW,
        dataset: CodeAlpacaDataset,
        trunk: TrunkOutputs,
        config: TrainConfig,
        micro_batch_tokens: int,
        ranks: Ranks = ALONE,
    ):
        self.engine = engine
        self.optimizer = optimizer
        self.dataset = dataset
        self.trunk = trunk
        self.config = config
        self.micro_batch_tokens = micro_batch_tokens
        self.ranks = ranks
        self.trained = [p for p in engine.model.parameters() if p.requires_grad]
        self.head = engine.model.lm_head.weight
        self.frozen_head = None if self.head.requires_grad else padded_head(self.head, engine.dtype)
        self.loss_scale = LossScale(engine.device) if engine.dtype == torch.float16 else None
        # The model stays unchanged from the first step on that was not finite, although the host reads that step's
        # loss some steps later.
        self.stopped = torch.zeros((), dtype=torch.bool, device=engine.device)
        self.skip = torch.zeros((), device=engine.device)  # 1 where AdamW is to change nothing
        self.dtype_in_passes = engine.dtype_in_passes(self.trained)
        self.shards = Shards(optimizer, ranks, self.dtype_in_passes) if ranks.world > 1 else None
        self.costs = self._costs() if ranks.world > 1 else None

    def tensors(self) -> dict[str, Tensor]:
        """State of the training besides model and optimizer, for checkpoints."""
        return self.loss_scale.tensors() if self.loss_scale else {}

    def check_ranks(self, step: int) -> None:
        """Check that the passes of all ranks use the same parameters; all ranks call it.

        Args:
            step: steps done, for the message.

        Raises:
            RanksDifferError: they do not.
        """
        trained = {name: p for name, p in self.engine.model.named_parameters() if p.requires_grad}
        check_equal(self.ranks, trained, f"at step {step}", self.dtype_in_passes)

    def complete_state(self) -> None:
        """Give this rank the parameters and moments of the ranks that update them; all ranks call it."""
        if self.shards is not None:
            self.shards.gather_state()

    def step(self, step: int, rows: np.ndarray[Any, Any], learning_rate: float) -> PendingStep:
        """Queue one optimizer step over ``rows``.

        Args:
            step: 0 for the first.
        """
        self.optimizer.learning_rate = learning_rate
        lengths = self.dataset.lengths[rows, 0]
        weight = self.dataset.loss_weight(rows)
        targets = int(self.dataset.target_counts(rows).sum()) if weight > 0 else 0
        computed = self.trunk.computed
        self.engine.start_step(step)
        if weight > 0:
            loss, norm = self._sum_and_clip(self._accumulate_gradients(self._share(rows), weight))
            self._update(loss, norm)
        else:  # no token bears loss: nothing to learn, and the mean would divide by zero (trl#6668)
            loss = norm = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        flops = necessary_flops(
            self.engine.model.config,
            self.engine.model.num_frozen,
            int(lengths.sum()) - len(lengths),
            targets,
            self._trunk_tokens(rows, computed),
            self.head.requires_grad,
        )
        results = [loss, norm, self.stopped]
        if self.loss_scale:
            results += [self.loss_scale.scale, self.loss_scale.skipped]
        on_device = torch.stack([result.double() for result in results])
        return PendingStep(step + 1, learning_rate, int(lengths.sum()), flops, on_device)

    def _costs(self) -> np.ndarray[Any, Any]:
        """Operations that each row of the data set needs in a step, (rows,), int64."""
        model = self.engine.model
        flops = partial(necessary_flops, model.config, model.num_frozen, train_head=self.head.requires_grad)
        targets = self.dataset.target_counts(np.arange(len(self.dataset)))
        tokens = np.where(targets > 0, self.dataset.lengths[:, 0].astype(np.int64) - 1, 0)
        token = int(flops(1, 0, 0 if self.trunk.keeps else 1))
        return token * tokens + int(flops(0, 1, 0)) * targets

    def _share(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """This rank's rows of a step, in the step's order: shares cost about the same, and may be empty."""
        if self.costs is None:
            return rows
        return rows[deal(self.costs[rows], self.ranks.world)[self.ranks.rank]]

    def _trunk_tokens(self, rows: np.ndarray[Any, Any], before: int) -> int:
        """Tokens whose trunk output all ranks computed in this step.

        Args:
            before: tokens that this rank had computed before the step.
        """
        if self.ranks.world == 1 or self.trunk.keeps:
            return self.trunk.computed - before
        rows = self.dataset.with_targets(rows)
        return int(self.dataset.lengths[rows, 0].sum(dtype=np.int64)) - len(rows)

    def _accumulate_gradients(self, rows: np.ndarray[Any, Any], weight: float) -> Tensor:
        """Run forward and backward passes over the rows, which leave the gradients in the parameters' ``grad``.

        In fp16 the gradients are multiplied by the loss scale.

        Args:
            weight: sum of the loss weights of all target tokens; the loss is divided by it.

        Returns:
            The rows' part of the loss, a float64 scalar on the device.
        """
        engine = self.engine
        if self.shards is not None and not self._overwrites_gradients(rows):
            self.shards.zero()
        head = self.frozen_head if self.frozen_head is not None else padded_head(self.head, engine.dtype)
        head_gradient = torch.zeros_like(self.head) if self.head.requires_grad else None
        loss = torch.zeros((), device=engine.device, dtype=torch.float64)
        divisor = weight if self.loss_scale is None else weight / self.loss_scale.scale
        first = True
        for part in split_evenly(rows, self.dataset.lengths[rows, 0], self.micro_batch_tokens):
            batch = pack(self.dataset, part, engine.device)
            if not len(batch.targets):
                continue

            def loss_of(hidden: Tensor, batch: Pack = batch) -> tuple[Tensor, Tensor]:
                total, gradient = head_loss(
                    hidden, head, self.head.size(0), batch.targets, batch.weights, head_gradient
                )
                return total / weight, gradient / divisor

            loss += engine.forward_backward(self.trunk(batch), batch, loss_of, first)
            first = False
        if head_gradient is not None:
            head_gradient /= divisor
            self.head.grad = head_gradient if self.head.grad is None else self.head.grad.add_(head_gradient)
        return loss

    def _overwrites_gradients(self, rows: np.ndarray[Any, Any]) -> bool:
        """Whether the first pass over the rows overwrites all gradients: a graph does, and it knows no head."""
        has_pass = bool(self.dataset.target_counts(rows).any())
        return has_pass and self.engine.keeps_gradients and self.frozen_head is not None

    def _sum_and_clip(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the ranks, scale the gradients down to the largest norm allowed, and in fp16 undo the loss scale.

        Of several ranks, each sums and scales the part of the gradients that it updates.

        Args:
            loss: of this rank's rows.

        Returns:
            The loss of all ranks' rows, and the norm of all gradients before clipping.
        """
        if self.shards is None:
            gradients = [p.grad for p in self.trained if p.grad is not None]
            # As torch.nn.utils.clip_grad_norm_, which groups all tensors by device and dtype first.
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        else:
            gradients = [self.shards.sum_gradients()]
            numbers = torch.stack([loss, torch.linalg.vector_norm(gradients[0]).to(loss.dtype).square()])
            self.ranks.sum_in_order([numbers])
            loss, norm = numbers[0], numbers[1].sqrt().to(gradients[0].dtype)
        if self.loss_scale is not None:
            norm = norm / self.loss_scale.scale
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.loss_scale is not None:
            factor = factor / self.loss_scale.scale
        torch._foreach_mul_(gradients, factor)
        return loss, norm

    def _update(self, loss: Tensor, norm: Tensor) -> None:
        """Update the parameters unless this step, or one before it, was not finite; then drop the gradients.

        Gradients in a buffer stay allocated.
        """
        overflow = ~torch.isfinite(norm)
        self.stopped.logical_or_(~torch.isfinite(loss))
        if self.loss_scale is None:
            self.stopped.logical_or_(overflow)
        else:
            self.loss_scale.update(overflow)
            self.stopped.logical_or_(self.loss_scale.scale < LEAST)
        self.skip.copy_(self.stopped | overflow)
        self.optimizer.step(self.skip)
        if self.shards is not None:
            self.shards.gather_parameters()
            return
        if self.engine.keeps_gradients:
            self.head.grad = None  # not among the gradients that the engine keeps
        else:
            self.optimizer.zero_grad()
