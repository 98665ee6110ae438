"""Causal attention for each layout of tokens: padded rows, rows continued from a cache, packed documents.

Shapes: B rows, T tokens of a row, N tokens of all packed documents, S cached tokens, H heads, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.net.config import GPTConfig

# Without cuDNN's kernel, PyTorch's first choice on some GPUs: it takes up to half a second for each new length
# (FunASR#3704), and is not deterministic (pytorch, sdp_utils.cpp).
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attend(Protocol):
    """Causal attention of one block: queries, keys, values (..., H, K) and a dropout rate -> (..., H, K)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor: ...


class Layout(Protocol):
    """The arrangement of tokens; it decides which tokens a token attends to."""

    def layer(self, index: int) -> Attend:
        """Attention of block number ``index``."""


class Rows:
    """Right-padded rows, q, k, v (B, T, H, K): the causal mask keeps real tokens from attending to the padding."""

    def layer(self, index: int) -> Attend:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))  # (B, H, T, K)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return y.transpose(-3, -2)


@dataclass(eq=False)
class Documents:
    """Documents concatenated without padding, q, k, v (N, H, K): a token attends to its own document only.

    Attributes:
        lengths: tokens of each document.
        begins: (N,), first index of each token's document; int32, on the device.
        ends: (N,), end of each token's document, exclusive; int32, on the device.
    """

    lengths: list[int]
    begins: Tensor
    ends: Tensor

    def layer(self, index: int) -> Attend:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        rows, dtype = Rows(), q.dtype
        if dtype == torch.bfloat16 and not q.is_cuda:  # the CPU's kernel is faster in fp32 where rows are short
            q, k, v = q.float(), k.float(), v.float()
        parts = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        with sdpa_kernel(_KERNELS):
            return torch.cat([rows(q[None], k[None], v[None], dropout)[0] for q, k, v in parts]).to(dtype)


class KVCache:
    """Keys and values of past tokens, one slot per position, each row at its own length.

    Rows are right-padded: row b's next token goes to slot ``lengths[b]``, so prompts of different lengths
    need neither left padding nor shifted positions.
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, H, S, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, H, S, K)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)  # (B,)

    def layer(self, index: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, K)
            slots = self.lengths[:, None] + torch.arange(k.size(2), device=k.device)  # (B, T)
            slots = slots.clamp(max=self.keys.size(3) - 1)  # rows that are done may grow beyond the cache
            slot_index = slots[:, None, :, None].expand_as(k)
            self.keys[index].scatter_(2, slot_index, k.to(self.keys.dtype))
            self.values[index].scatter_(2, slot_index, v.to(self.values.dtype))
            # Row b's t-th new token attends to the slots up to its own.
            mask = torch.arange(self.keys.size(3), device=k.device) <= slots[:, None, :, None]  # (B, 1, T, S)
            keys, values = self.keys[index].to(q.dtype), self.values[index].to(q.dtype)
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)

        return attend
