"""AdamW by PyTorch's fused kernel, without what ``torch.optim.AdamW(fused=True)`` does around it.

Both give the same bits. PyTorch's class imports torch._dynamo at its first use, which takes one to four seconds of a
processor, and groups all tensors by device and dtype in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BETAS = 0.9, 0.999
_EPSILON = 1e-8


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same weight decay.

    Attributes:
        parameters: of one device and dtype.
        weight_decay: times the learning rate, it is the share that each step takes off.
    """

    parameters: Sequence[nn.Parameter]
    weight_decay: float


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Args:
        groups: of the parameters to update.
        learning_rate: of the next steps; it may be set before each.

    Attributes:
        state: the moments ``exp_avg`` and ``exp_avg_sq`` of each parameter, and its number of updates ``step``, a
            scalar on the device. Empty before the first step, as with PyTorch's class, so that checkpoints are alike.
    """

    def __init__(self, groups: Sequence[ParameterGroup], learning_rate: float):
        self.groups = groups
        self.learning_rate = learning_rate
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, zeros if it has none yet."""
        if parameter not in self.state:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        return self.state[parameter]

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters that have a gradient.

        Args:
            skip: 1 on the device where nothing is to change, else 0; the host does not wait to read it. This is what
                ``torch.amp.GradScaler`` uses.
        """
        for group in self.groups:
            parameters: list[Tensor] = [each for each in group.parameters if each.grad is not None]
            if not parameters:
                continue
            states = [self.state_of(parameter) for parameter in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters,
                [each.grad for each in parameters if each.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=self.learning_rate,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                weight_decay=group.weight_decay,
                eps=_EPSILON,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None
