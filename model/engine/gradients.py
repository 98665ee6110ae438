"""Gradients of all trained parameters in one tensor, which ranks sum in one exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LANES = 64  # elements: each gradient begins at a multiple, for kernels that read several numbers at once


class GradientBuffer:
    """The parameters' ``grad`` as parts of one tensor: backward passes and CUDA graphs write there directly.

    Args:
        parameters: of one dtype, on one device; they keep these gradients from now on.
        parts: number of parts of equal size that the tensor can be cut into.

    Attributes:
        flat: (elements,), all gradients, with zeros between them.
    """

    def __init__(self, parameters: Sequence[Tensor], parts: int):
        sizes = [-(-p.numel() // _LANES) * _LANES for p in parameters]
        self.flat = torch.zeros(
            -(-sum(sizes) // (parts * _LANES)) * parts * _LANES,
            dtype=parameters[0].dtype,
            device=parameters[0].device,
        )
        for parameter, gradient in zip(parameters, self.flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = gradient[: parameter.numel()].view_as(parameter)

    def zero(self) -> None:
        """Set all gradients to zero. A rank without a pass in a step would send those of the step before again."""
        self.flat.zero_()
