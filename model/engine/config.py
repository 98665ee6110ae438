"""Hyper-parameters of a training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.parameters import Count, NonNegative, Positive, Seeded, Share, WholeShare


@dataclass(frozen=True)
class TrainConfig(Seeded):
    """Hyper-parameters of a training; all of them are part of its identity."""

    epochs: Count = 3
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, if that is sooner."""
    batch_size: Count = 32
    """Rows per optimizer step."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward and backward pass, about. It decides memory and speed, and changes no step. null chooses by
    device. It is halved where memory does not hold a pass."""
    learning_rate: Positive = 1e-4
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    weight_decay: NonNegative = 0.01
    """AdamW's decay of matrices; biases and norms have none."""
    warmup_ratio: WholeShare = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    prompt_loss_weight: NonNegative = 0.0
    """Weight of the loss on prompt tokens, in training only; 0 trains on responses alone."""
    dropout: Share = 0.0
    """Dropout rate in the trained blocks."""
    eval_freq: Count = 100
    """Steps between validations. Each also saves a checkpoint; on a GPU one is written every 15 seconds at most."""
    patience: Count | None = None
    """Validations in a row without a lower loss after which the training ends early; null trains to the end."""
    eval_rows: Count | None = 1000
    """Rows of the validation split, from its beginning, that each validation scores; null takes all."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    """bf16, fp16 (with dynamic loss scaling), fp32, tf32 (fp32 with faster, coarser products on a GPU), or auto: bf16
    where the hardware has it, fp16 on older GPUs, else fp32."""

    def determinants(self) -> dict[str, Any]:
        """All parameters by name, but for ``patience`` where it is not set: earlier trainings had none."""
        return {name: value for name, value in asdict(self).items() if name != "patience" or value is not None}

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole training over ``rows`` rows."""
        steps = self.epochs * math.ceil(rows / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)
