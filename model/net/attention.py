"""Causal attention for each layout of tokens: padded rows, packed documents.

Shapes: B rows, T tokens of a row, N tokens of all packed documents, H heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.net.device import send
from model.net.noise import FIRST_HEAD, Noise

_WEIGHTS = 1 << 23  # attention weights that exist at a time where they need noise
# Without cuDNN's kernel, PyTorch's first choice on some GPUs: it takes up to half a second for each new length
# (FunASR#3704), and is not deterministic (pytorch, sdp_utils.cpp).
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Layer(Protocol):
    """The arrangement of tokens as one block needs it: which tokens attend to which, and the noise of dropout."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Causal attention: queries, keys, values (..., H, K) and a dropout rate -> (..., H, K)."""

    def drop(self, x: Tensor, branch: int, dropout: float) -> Tensor:
        """Dropout of the output (..., D) of a residual branch, ``ATTENTION_BRANCH`` or ``MLP_BRANCH``."""


class Layout(Protocol):
    """The arrangement of tokens; it decides which tokens a token attends to."""

    def layer(self, index: int) -> Layer:
        """The arrangement as block number ``index`` sees it."""


class Rows:
    """Right-padded rows, q, k, v (B, T, H, K): the causal mask keeps real tokens from attending to the padding.

    Dropout draws from torch's global generator.
    """

    def layer(self, index: int) -> Layer:
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (B, H, T, K)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(-3, -2)

    def drop(self, x: Tensor, branch: int, dropout: float) -> Tensor:
        return F.dropout(x, dropout, dropout > 0)


@dataclass(eq=False)
class Documents:
    """Documents concatenated without padding, q, k, v (N, H, K): a token attends to its own document only.

    Attributes:
        lengths: tokens of each document.
        begins: (N,), first index of each token's document; int32, on the device.
        ends: (N,), end of each token's document, exclusive; int32, on the device.
        noise: of dropout; None for passes without it.
    """

    lengths: list[int]
    begins: Tensor
    ends: Tensor
    noise: Noise | None = None

    def layer(self, index: int) -> Layer:
        return _DocumentsLayer(self, index)

    @cached_property
    def groups(self) -> Groups:
        """The documents in groups of similar length."""
        return Groups(self.lengths, self.begins.device)


class Groups:
    """Packed documents as groups of padded rows: attention works on a group at a time instead of a document.

    Args:
        lengths: N tokens in all, as documents.

    Attributes:
        shapes: rows and columns (B, T) of each group.
        index: token at each place of all groups, (P,); N for padding.
        inverse: place of each token, (N,).
    """

    def __init__(self, lengths: list[int], device: torch.device):
        sizes = np.array(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        self.shapes: list[tuple[int, int]] = []
        parts = []
        for group in _similar(sizes):
            columns = np.arange(sizes[group].max())
            places = starts[group, None] + columns
            parts.append(np.where(columns < sizes[group, None], places, sizes.sum()).ravel())
            self.shapes.append((len(group), len(columns)))
        index = np.concatenate(parts)
        inverse = np.empty(sizes.sum() + 1, dtype=np.int64)
        inverse[index] = np.arange(len(index))
        self.index, self.inverse = (send(each, device) for each in (index, inverse[:-1]))

    def spread(self, x: Tensor) -> list[Tensor]:
        """Tokens (N, ...) as groups (B, T, ...); padding is zero."""
        parts = _Move.apply(x, self.index, self.inverse).split([rows * columns for rows, columns in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def gather(self, groups: list[Tensor]) -> Tensor:
        """The tokens (N, ...) of groups (B, T, ...)."""
        return _Move.apply(torch.cat([group.flatten(0, 1) for group in groups]), self.inverse, self.index)


def _similar(sizes: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Numbers of documents in groups of similar length, in which at most an eighth of the places is padding."""
    order = np.argsort(sizes, kind="stable")[::-1]
    begin = total = 0
    for end, size in enumerate(sizes[order]):
        if 7 * sizes[order[begin]] * (end + 1 - begin) > 8 * (total + size):
            yield order[begin:end]
            begin, total = end, 0
        total += size
    yield order[begin:]


class _Move(torch.autograd.Function):
    """x[index], with zeros where index is len(x); the gradient moves back by ``inverse`` in the same way.

    Both directions only read at an index, which is fast and has no order of sums; torch's own gradient would add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index, inverse)
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        return _Move.apply(gradient, inverse, index), None, None


class _DocumentsLayer:
    """Packed documents as one block sees them; for Layer's methods, see there."""

    def __init__(self, documents: Documents, index: int):
        self.documents = documents
        self.index = index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        groups, dtype = self.documents.groups, q.dtype
        if dtype.itemsize == 2 and not q.is_cuda:  # the CPU's kernel is faster in fp32 where rows are short
            q, k, v = q.float(), k.float(), v.float()
        keys: list[Tensor | None] = [None] * len(groups.shapes)
        if dropout:
            of_heads = self._noise().keys(self.index, q.size(1))[FIRST_HEAD:]  # (H, 2, N)
            keys = [*groups.spread(of_heads.permute(2, 0, 1))]  # (B, T, H, 2)
        parts = zip(*(groups.spread(x) for x in (q, k, v)), keys, strict=True)
        return groups.gather([self._attend_group(*part) for part in parts]).to(dtype)

    def _attend_group(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
        """Attention of a group, (B, T, H, K); with dropout if ``keys`` (B, T, H, 2) are given."""
        if keys is None:
            with sdpa_kernel(_KERNELS):
                return Rows().attend(q, k, v, 0.0)
        noise = self._noise()
        rows = max(1, _WEIGHTS // (q.size(1) ** 2 * q.size(2)))
        parts = zip(q.split(rows), k.split(rows), v.split(rows), keys.split(rows), strict=True)
        return torch.cat([_attend_with_noise(*part, noise) for part in parts])

    def drop(self, x: Tensor, branch: int, dropout: float) -> Tensor:
        if not dropout:
            return x
        noise = self._noise()
        return noise.drop(x, noise.keys(self.index, heads=0)[branch])

    def _noise(self) -> Noise:
        if self.documents.noise is None:
            raise ValueError("packed documents need a source of noise where dropout acts")
        return self.documents.noise


def _attend_with_noise(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, noise: Noise) -> Tensor:
    """Causal attention of padded rows (B, T, H, K), with dropout of its weights by keys (B, T, H, 2)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, K)
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return (noise.drop(weights, keys.permute(0, 2, 3, 1)) @ v).transpose(1, 2)
