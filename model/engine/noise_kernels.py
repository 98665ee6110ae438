"""The noise of ``model.net.noise`` in Triton: the same bits as there. Imported only where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.net.noise import ATTENTION_BRANCH, ELEMENT_ROUNDS, FIRST_HEAD, MLP_BRANCH, Noise, stream_of

_ROUNDS = tl.constexpr(ELEMENT_ROUNDS)


@triton.jit  # type: ignore[untyped-decorator]
def kept(key, first, element, threshold):  # type: ignore[no-untyped-def]
    """Which elements are kept, by the two words of their token's key; all uint32, and broadcast."""
    x, y = tl.broadcast(element, first)
    for _ in tl.static_range(_ROUNDS):
        product = x.to(tl.uint64) * 0xD256D193
        x = (product >> 32).to(tl.uint32) ^ key ^ y
        y = product.to(tl.uint32)
        key += 0x9E3779B9
    return x >= threshold


@triton.jit  # type: ignore[untyped-decorator]
def load_key(keys, place, tokens, inside):  # type: ignore[no-untyped-def]
    """The two words of the keys at some places of a stream (2, tokens)."""
    key = tl.load(keys + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return key, tl.load(keys + tokens + place, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "stream"])  # type: ignore[untyped-decorator]
def _token_keys(names, origin, keys, tokens, stream, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys of some tokens in one stream."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    name = tl.load(names + place, mask=inside, other=0)
    seed = tl.load(origin).to(tl.uint64)
    step = tl.load(origin + 1).to(tl.uint32)
    row, position = (name >> 32).to(tl.uint32), name.to(tl.uint32)
    number = (stream + tl.program_id(1)).to(tl.uint32)
    zero = tl.zeros_like(row)
    first, second, _, _ = tl.philox(seed, position, row, zero + number, zero + step, 10)
    keys += tl.program_id(1).to(tl.int64) * 2 * tokens + place
    tl.store(keys, first.to(tl.int32, bitcast=True), mask=inside)
    tl.store(keys + tokens, second.to(tl.int32, bitcast=True), mask=inside)


@dataclass(eq=False)
class Mask:
    """Dropout of one or more streams, as the kernels take it.

    Attributes:
        keys: of the tokens, (..., 2, N), int32.
        threshold: elements whose bits are below it are dropped.
        factor: of the elements that are kept.
    """

    keys: Tensor
    threshold: int
    factor: float


def masks(noise: Noise, layer: int, heads: int, chosen: Tensor | None = None) -> tuple[Mask, Mask, Mask]:
    """Of a layer: the attention weights of all heads, the output of the attention, the output of the MLP.

    Args:
        chosen: tokens whose outputs are computed, (M,); None for all.
    """
    keys = token_keys(noise, layer, heads)
    branches = keys[:FIRST_HEAD] if chosen is None else keys[:FIRST_HEAD].index_select(2, chosen)
    parts = keys[FIRST_HEAD:], branches[ATTENTION_BRANCH], branches[MLP_BRANCH]
    return tuple(Mask(part, noise.threshold, noise.scale) for part in parts)  # type: ignore[return-value]


def token_keys(noise: Noise, layer: int, heads: int) -> Tensor:
    """``noise.keys(layer, heads)``, (heads + 2, 2, N), with the bits of each word in an int32."""
    tokens, streams = len(noise.tokens), heads + FIRST_HEAD
    keys = torch.empty(streams, 2, tokens, dtype=torch.int32, device=noise.tokens.device)
    _token_keys[(triton.cdiv(tokens, 256), streams)](
        noise.tokens, noise.origin, keys, tokens, stream_of(layer), BLOCK=256, num_warps=4
    )
    return keys
