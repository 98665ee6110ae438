"""Triton kernels of a decoding step: attention of one new token of each row to the row's cached tokens.

A row's keys and values lie together in the cache, so a program reads the tokens that exist and no padding. Each of
its lanes keeps its own maximum and sum (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), which are
joined once at the end. Where rows are few, several programs share the tokens of a row (FlashDecoding), and a second
kernel joins their parts. The new key and value are written to the cache on the way.

Shapes: B rows, H heads, K width of a head, P places of the cache, S parts of a row. Imported only where there is a
GPU, as triton may be missing elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512  # programs, at least, that a step should have: about four for each of a large GPU's processors
_MOST_PARTS = 16
_TILE = 2048  # numbers of a key or value that a program holds at a time


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, begins, lengths, out, sums_out, tops_out, places, heads, scale,
    K: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One part of a row's tokens, one head. The last part also has the new token, and stores its key and value."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    lanes, tokens = tl.arange(0, K), tl.arange(0, TOKENS)
    length = tl.load(lengths + row)
    qkv += row * 3 * heads * K + head * K + lanes
    q = tl.load(qkv).to(tl.float32) * scale
    base = (head.to(tl.int64) * places + tl.load(begins + row)) * K
    size = tl.cdiv(tl.cdiv(tl.maximum(length, 0), PARTS), TOKENS) * TOKENS
    first = part * size
    last = tl.minimum(first + size, length)
    highest = tl.full([TOKENS], -1e30, tl.float32)
    sums = tl.zeros([TOKENS], tl.float32)
    total = tl.zeros([TOKENS, K], tl.float32)
    for start in range(first, last, TOKENS):
        inside = start + tokens < last
        place = base + (start + tokens)[:, None] * K + lanes[None, :]
        k = tl.load(keys + place, mask=inside[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(q[None, :] * k, 1), -1e30)
        higher = tl.maximum(highest, score)
        p = tl.where(inside, tl.exp2(score - higher), 0.0)
        shrink = tl.exp2(highest - higher)
        sums = sums * shrink + p
        total = total * shrink[:, None] + p[:, None] * v
        highest = higher
    top = tl.max(highest, 0)
    share = tl.exp2(highest - top)
    weight = tl.sum(sums * share, 0)
    result = tl.sum(total * share[:, None], 0)
    if part == PARTS - 1:
        k = tl.load(qkv + heads * K)
        v = tl.load(qkv + 2 * heads * K)
        alive = lanes < tl.where(length >= 0, K, 0)
        tl.store(keys + base + length * K + lanes, k, mask=alive)
        tl.store(values + base + length * K + lanes, v, mask=alive)
        score = tl.sum(q * k.to(tl.float32), 0)
        higher = tl.maximum(top, score)
        p = tl.exp2(score - higher)
        shrink = tl.exp2(top - higher)
        weight = weight * shrink + p
        result = result * shrink + p * v.to(tl.float32)
        top = higher
    place = row * heads + head
    if PARTS == 1:
        tl.store(out + place * K + lanes, (result / weight).to(out.dtype.element_ty))
    else:
        place = place * PARTS + part
        tl.store(out + place * K + lanes, result)
        tl.store(sums_out + place, weight)
        tl.store(tops_out + place, top)


@triton.jit  # type: ignore[untyped-decorator]
def _join(parts, sums, tops, out, K: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of one row and head; PARTS is a power of two."""
    place = tl.program_id(0).to(tl.int64)
    lanes, numbers = tl.arange(0, K), place * PARTS + tl.arange(0, PARTS)
    tops_here = tl.load(tops + numbers)
    share = tl.exp2(tops_here - tl.max(tops_here, 0))
    weight = tl.sum(tl.load(sums + numbers) * share, 0)
    values = tl.load(parts + numbers[:, None] * K + lanes[None, :])
    result = tl.sum(values * share[:, None], 0) / weight
    tl.store(out + place * K + lanes, result.to(out.dtype.element_ty))


def parts_of(rows: int, heads: int) -> int:
    """Programs that share a row: a power of two."""
    parts = 1
    while parts < _MOST_PARTS and rows * heads * parts < _PROGRAMS:
        parts *= 2
    return parts


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, begins: Tensor, lengths: Tensor, heads: int, tokens: int | None = None
) -> Tensor:
    """Attention of a new token of each row, whose key and value are stored behind those of the row.

    Args:
        qkv: query, key and value of the new tokens, (B, 3 H K).
        keys, values: of all rows, (H, P, K).
        begins: place of each row's first token, (B,), int64.
        lengths: tokens of each row that the cache has, (B,), int64; negative: the row has ended, its result has no
            meaning, and nothing is stored.
        heads: H.
        tokens: that a program reads at a time, a power of two; None for what fits its registers.

    Returns:
        (B, H K).
    """
    rows, width = qkv.size(0), qkv.size(1) // (3 * heads)
    parts = parts_of(rows, heads)
    out = qkv.new_empty(rows, heads * width)
    kept = sums = tops = out
    if parts > 1:
        kept = torch.empty(rows, heads, parts, width, dtype=torch.float32, device=qkv.device)
        sums, tops = (torch.empty(rows, heads, parts, dtype=torch.float32, device=qkv.device) for _ in range(2))
    scale = width**-0.5 * 1.4426950408889634  # softmax in base 2
    _attend[(rows, heads, parts)](
        qkv, keys, values, begins, lengths, kept, sums, tops, keys.size(1), heads, scale, K=width,
        TOKENS=tokens or _TILE // width, PARTS=parts, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _join[(rows * heads,)](kept, sums, tops, out, K=width, PARTS=parts, num_warps=1)
    return out
