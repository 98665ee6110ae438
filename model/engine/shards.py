"""The update of several ranks: each sums the gradients of one part of the parameters and updates that part.

This is stage 1 of ZeRO (Rajbhandari et al. 2020), but only time is saved: clipping and AdamW take 1/N of it, and
parameters are sent in the dtype in which passes use them. Every rank has memory for all parameters and moments, which
it needs when a checkpoint is written or read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from model.engine.adamw import MOMENTS, AdamW
from model.engine.ranks import Ranks

_LANES = 64  # elements: each parameter begins at a multiple, for kernels that read several numbers at once


class Shards:
    """The parameters of an optimizer, and their gradients, each as parts of one tensor with a part for every rank.

    Backward passes and CUDA graphs write to the gradients directly. The parameters stay the same objects; from now on
    they and their ``grad`` are views.

    Args:
        optimizer: of parameters of one dtype, on one device; from now on it updates this rank's part only.
        ranks: two at least.
        dtype: in which passes use the parameters. If it is another dtype than theirs, the parameters that other ranks
            update are rounded to it here, until ``gather_state``.

    Attributes:
        parameters: (elements,), all parameters, with zeros between them.
        gradients: (elements,), all gradients, with zeros between them.
    """

    def __init__(self, optimizer: AdamW, ranks: Ranks, dtype: torch.dtype):
        self.optimizer, self.ranks = optimizer, ranks
        self._members = [p for group in optimizer.groups for p in group.parameters]
        self._begins: list[int] = []
        size = 0
        for parameter in self._members:
            self._begins.append(size)
            size += -(-parameter.numel() // _LANES) * _LANES
        self._part = -(-size // (ranks.world * _LANES)) * _LANES  # elements of a rank's part
        self.parameters = self._flatten(self._members)
        self.gradients = torch.zeros_like(self.parameters)
        self._rounded: Tensor | None = None
        if dtype != self.parameters.dtype:
            self._rounded = torch.empty_like(self.parameters, dtype=dtype)
        for parameter, value, gradient in zip(
            self._members, self._views(self.parameters), self._views(self.gradients), strict=True
        ):
            parameter.data = value
            parameter.grad = gradient
        optimizer.update_only(dict(zip(self._members, self._own(), strict=True)))

    def zero(self) -> None:
        """Set all gradients to zero. A rank without a pass in a step would send those of the step before again."""
        self.gradients.zero_()

    def sum_gradients(self) -> Tensor:
        """This rank's part of the gradients, summed over the ranks. The other parts are not of use any more."""
        return self.ranks.sum_own_part(self.gradients)

    def gather_parameters(self) -> None:
        """Give all ranks the parameters that each has updated, as passes use them."""
        if self._rounded is None:
            self.ranks.gather_parts(self.parameters)
            return
        rank = self.ranks.rank
        parts, rounded = (flat.view(self.ranks.world, -1) for flat in (self.parameters, self._rounded))
        rounded[rank].copy_(parts[rank])
        self.ranks.gather_parts(self._rounded)
        for others in (slice(rank), slice(rank + 1, None)):
            parts[others].copy_(rounded[others])

    def gather_state(self) -> None:
        """Give all ranks the parameters, not rounded, and the moments that each has updated, for a checkpoint."""
        if not self.optimizer.state:  # nothing is updated yet
            return
        if self._rounded is not None:
            self.ranks.gather_parts(self.parameters)
        for kind in MOMENTS:
            moments = [self.optimizer.state[parameter][kind] for parameter in self._members]
            flat = self._flatten(moments)
            self.ranks.gather_parts(flat)
            for moment, gathered in zip(moments, self._views(flat), strict=True):
                moment.copy_(gathered)

    def _flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Copies of tensors of the parameters' shapes, in one tensor."""
        first = self._members[0]
        flat = torch.zeros(self._part * self.ranks.world, dtype=first.dtype, device=first.device)
        for tensor, place in zip(tensors, self._views(flat), strict=True):
            place.copy_(tensor.detach())
        return flat

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [
            flat[begin : begin + parameter.numel()].view(parameter.shape)
            for begin, parameter in zip(self._begins, self._members, strict=True)
        ]

    def _own(self) -> list[slice]:
        """The elements of each flattened parameter that lie in this rank's part."""
        first, last = self.ranks.rank * self._part, (self.ranks.rank + 1) * self._part
        slices = []
        for begin, parameter in zip(self._begins, self._members, strict=True):
            start = min(max(first - begin, 0), parameter.numel())
            slices.append(slice(start, max(start, min(last - begin, parameter.numel()))))
        return slices
