"""Dynamic loss scaling for training in fp16."""

from __future__ import annotations

import torch
from torch import Tensor

_START = 2.0**16
_GROWTH_STEPS = 2_000  # steps without overflow after which the scale is doubled
LEAST = 1.0  # below it the scale cannot help: the gradients themselves are too large for fp16


class LossScale:
    """The factor of the loss that keeps small gradients above fp16's smallest numbers (Micikevicius et al. 2018).

    A step whose gradients overflow is skipped, and halves the scale; after 2,000 steps without overflow it doubles.
    The defaults are those of torch.amp.GradScaler. The host never waits for the device here.

    Attributes:
        scale: (), fp32, on the device.
        skipped: steps skipped so far, (), int64, on the device.
    """

    def __init__(self, device: torch.device):
        self.scale = torch.full((), _START, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """Adapt the scale after a step.

        Args:
            overflow: whether the step's gradients are not finite, (), bool.
        """
        self.skipped += overflow
        torch._amp_update_scale_(self.scale, self._good_steps, overflow.float(), 2.0, 0.5, _GROWTH_STEPS)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name; checkpoints read and overwrite these tensors."""
        return {"scale": self.scale, "skipped": self.skipped, "good_steps": self._good_steps}
