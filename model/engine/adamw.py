"""AdamW by PyTorch's fused kernel, without what ``torch.optim.AdamW(fused=True)`` does around it.

Both give the same bits. PyTorch's class imports torch._dynamo at its first use, which takes one to four seconds of a
processor, and groups all tensors by device and dtype in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of a parameter's gradients and of their squares
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
        self._ranges: Mapping[Tensor, slice] | None = None

    def update_only(self, ranges: Mapping[Tensor, slice]) -> None:
        """Update these elements of each flattened parameter from now on, and their moments; others stay."""
        self._ranges = {parameter: its for parameter, its in ranges.items() if its.start < its.stop}

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
            parameters = [each for each in group.parameters if each.grad is not None]
            if not parameters:
                continue
            steps = [self.state_of(parameter)["step"] for parameter in parameters]
            torch._foreach_add_(steps, 1)
            updated = parameters if self._ranges is None else [each for each in parameters if each in self._ranges]
            self._update(updated, group.weight_decay, skip)
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))

    def _update(self, parameters: Sequence[nn.Parameter], weight_decay: float, skip: Tensor | None) -> None:
        if not parameters:  # none of the group is in the ranges
            return
        states = [self.state[parameter] for parameter in parameters]
        torch._fused_adamw_(
            self._cut(parameters, parameters),
            self._cut(parameters, [each.grad for each in parameters if each.grad is not None]),
            self._cut(parameters, [state["exp_avg"] for state in states]),
            self._cut(parameters, [state["exp_avg_sq"] for state in states]),
            [],
            [state["step"] for state in states],
            lr=self.learning_rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=weight_decay,
            eps=_EPSILON,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )

    def _cut(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is updated of the parameters, or of their gradients or moments."""
        if self._ranges is None:
            return list(tensors)
        return [tensor.view(-1)[self._ranges[of]] for of, tensor in zip(parameters, tensors, strict=True)]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None
