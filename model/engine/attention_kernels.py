"""Triton kernels for causal attention within packed documents, with its gradient.

FlashAttention (Dao 2023, arXiv:2307.08691, algorithms 1 and 2; softmax in base 2, log-sum-exp kept for the backward
pass) over tiles of the whole sequence: a query attends to the keys from its document's first token to itself, so a
tile of queries needs the keys from the first token of its first document on. PyTorch's attention for packed
documents works on tiles of one document each, mostly empty where documents are short; docs/performance.md compares
the two. All sums have a fixed order.

Shapes: N tokens, H heads, K width of a head; all inputs contiguous. Imported only where there is a GPU, as triton may
be missing elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.engine.noise_kernels import Mask, kept, load_key
from model.net.device import uses_tf32

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _attention_forward(  # type: ignore[no-untyped-def]
    qkv, begins, out, log_sums, noise, tokens, heads, scale, threshold, factor,
    K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head against the keys from the first token of its first document on."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1)
    width = heads * K
    lanes = tl.arange(0, K)
    i = first + tl.arange(0, QUERIES)
    begin = tl.load(begins + i, mask=i < tokens, other=0)
    qkv += head * K
    q = tl.load(qkv + i.to(tl.int64)[:, None] * (3 * width) + lanes, mask=(i < tokens)[:, None], other=0.0)
    result = tl.zeros([QUERIES, K], tl.float32)
    highest = tl.full([QUERIES], -1e30, tl.float32)
    sums = tl.zeros([QUERIES], tl.float32)
    if DROPS:
        key, salt = load_key(noise + head * 2 * tokens, i, tokens, i < tokens)
    for start in range(tl.load(begins + first), tl.minimum(first + QUERIES, tokens), KEYS):
        j = start + tl.arange(0, KEYS)
        place = j.to(tl.int64)[:, None] * (3 * width) + lanes
        k = tl.load(qkv + place + width, mask=(j < tokens)[:, None], other=0.0)
        v = tl.load(qkv + place + 2 * width, mask=(j < tokens)[:, None], other=0.0)
        visible = (j[None, :] <= i[:, None]) & (j[None, :] >= begin[:, None])
        scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(highest - higher)
        sums = sums * shrink + tl.sum(p, 1)
        if DROPS:
            element = (j[None, :] - begin[:, None]).to(tl.uint32)
            p = tl.where(kept(key[:, None], salt[:, None], element, threshold), p * factor, 0.0)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = higher
    place = i.to(tl.int64)[:, None] * width + head * K + lanes
    tl.store(out + place, (result / sums[:, None]).to(out.dtype.element_ty), mask=(i < tokens)[:, None])
    tl.store(log_sums + head * tokens + i, highest + tl.log2(sums), mask=i < tokens)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _attention_backward_q(  # type: ignore[no-untyped-def]
    qkv, begins, out, log_sums, noise, grad_out, deltas, grad_qkv, tokens, heads, scale, threshold, factor,
    K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and for the other kernel each query's sum of output times its gradient."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1)
    width = heads * K
    lanes = tl.arange(0, K)
    i = first + tl.arange(0, QUERIES)
    inside = i < tokens
    begin = tl.load(begins + i, mask=inside, other=0)
    qkv += head * K
    place_q = i.to(tl.int64)[:, None] * (3 * width) + lanes
    place_out = i.to(tl.int64)[:, None] * width + head * K + lanes
    q = tl.load(qkv + place_q, mask=inside[:, None], other=0.0)
    upstream = tl.load(grad_out + place_out, mask=inside[:, None], other=0.0)
    output = tl.load(out + place_out, mask=inside[:, None], other=0.0)
    delta = tl.sum(output.to(tl.float32) * upstream.to(tl.float32), 1)
    tl.store(deltas + head * tokens + i, delta, mask=inside)
    log_sum = tl.load(log_sums + head * tokens + i, mask=inside, other=0.0)
    gradient = tl.zeros([QUERIES, K], tl.float32)
    if DROPS:
        key, salt = load_key(noise + head * 2 * tokens, i, tokens, inside)
    for start in range(tl.load(begins + first), tl.minimum(first + QUERIES, tokens), KEYS):
        j = start + tl.arange(0, KEYS)
        place = j.to(tl.int64)[:, None] * (3 * width) + lanes
        k = tl.load(qkv + place + width, mask=(j < tokens)[:, None], other=0.0)
        v = tl.load(qkv + place + 2 * width, mask=(j < tokens)[:, None], other=0.0)
        visible = (j[None, :] <= i[:, None]) & (j[None, :] >= begin[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0)
        grad_p = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
        if DROPS:
            element = (j[None, :] - begin[:, None]).to(tl.uint32)
            grad_p = tl.where(kept(key[:, None], salt[:, None], element, threshold), grad_p * factor, 0.0)
        slope = p * (grad_p - delta[:, None])
        gradient += tl.dot(slope.to(k.dtype), k, input_precision=PRECISION)
    gradient *= scale / _LOG2_E
    tl.store(grad_qkv + head * K + place_q, gradient.to(grad_qkv.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _attention_backward_kv(  # type: ignore[no-untyped-def]
    qkv, begins, ends, log_sums, noise, grad_out, deltas, grad_qkv, tokens, heads, scale, threshold, factor,
    K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, from the queries up to the last token of its last document."""
    first, head = tl.program_id(0) * KEYS, tl.program_id(1)
    width = heads * K
    lanes = tl.arange(0, K)
    j = first + tl.arange(0, KEYS)
    inside = j < tokens
    qkv += head * K
    grad_out += head * K
    place_k = j.to(tl.int64)[:, None] * (3 * width) + width + lanes
    k = tl.load(qkv + place_k, mask=inside[:, None], other=0.0)
    v = tl.load(qkv + place_k + width, mask=inside[:, None], other=0.0)
    grad_k = tl.zeros([KEYS, K], tl.float32)
    grad_v = tl.zeros([KEYS, K], tl.float32)
    for start in range(first, tl.load(ends + tl.minimum(first + KEYS, tokens) - 1), QUERIES):
        i = start + tl.arange(0, QUERIES)
        real = i < tokens
        begin = tl.load(begins + i, mask=real, other=0)
        q = tl.load(qkv + i.to(tl.int64)[:, None] * (3 * width) + lanes, mask=real[:, None], other=0.0)
        upstream = tl.load(grad_out + i.to(tl.int64)[:, None] * width + lanes, mask=real[:, None], other=0.0)
        log_sum = tl.load(log_sums + head * tokens + i, mask=real, other=0.0)
        delta = tl.load(deltas + head * tokens + i, mask=real, other=0.0)
        visible = (j[:, None] <= i[None, :]) & (j[:, None] >= begin[None, :]) & real[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.where(visible, tl.exp2(scores - log_sum[None, :]), 0.0)  # (KEYS, QUERIES)
        grad_p = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        dropped = p
        if DROPS:
            key, salt = load_key(noise + head * 2 * tokens, i, tokens, real)
            element = (j[:, None] - begin[None, :]).to(tl.uint32)
            keep = kept(key[None, :], salt[None, :], element, threshold)
            dropped = tl.where(keep, p * factor, 0.0)
            grad_p = tl.where(keep, grad_p * factor, 0.0)
        grad_v += tl.dot(dropped.to(v.dtype), upstream, input_precision=PRECISION)
        slope = p * (grad_p - delta[None, :])
        grad_k += tl.dot(slope.to(q.dtype), q, input_precision=PRECISION)
    grad_k *= scale / _LOG2_E
    grad_qkv += head * K + place_k
    tl.store(grad_qkv, grad_k.to(grad_qkv.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_qkv + width, grad_v.to(grad_qkv.dtype.element_ty), mask=inside[:, None])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, begins: Tensor, ends: Tensor, heads: int, mask: Mask | None
    ) -> Tensor:
        tokens, width = qkv.size(0), qkv.size(1) // 3
        out = torch.empty(tokens, width, dtype=qkv.dtype, device=qkv.device)
        log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
        ctx.heads = heads
        ctx.scale = _LOG2_E.value * (width // heads) ** -0.5
        ctx.noise = (mask.threshold, mask.factor) if mask else (0, 1.0)
        ctx.options = {"K": width // heads, "DROPS": mask is not None, "PRECISION": _precision(), "num_warps": 4}
        keys = mask.keys if mask else None
        _attention_forward[(triton.cdiv(tokens, 64), heads)](
            qkv, begins, out, log_sums, keys, tokens, heads, ctx.scale, *ctx.noise,
            QUERIES=64, KEYS=32, num_stages=3, **ctx.options,
        )  # fmt: skip
        ctx.save_for_backward(qkv, begins, ends, out, log_sums, keys)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        qkv, begins, ends, out, log_sums, keys = ctx.saved_tensors
        tokens = len(out)
        gradient = gradient.contiguous()
        grad_qkv = torch.empty_like(qkv)
        deltas = torch.empty_like(log_sums)
        _attention_backward_q[(triton.cdiv(tokens, 64), ctx.heads)](
            qkv, begins, out, log_sums, keys, gradient, deltas, grad_qkv, tokens, ctx.heads, ctx.scale, *ctx.noise,
            QUERIES=64, KEYS=32, num_stages=3, **ctx.options,
        )  # fmt: skip
        _attention_backward_kv[(triton.cdiv(tokens, 64), ctx.heads)](
            qkv, begins, ends, log_sums, keys, gradient, deltas, grad_qkv, tokens, ctx.heads, ctx.scale, *ctx.noise,
            QUERIES=32, KEYS=64, num_stages=1, **ctx.options,
        )  # fmt: skip
        return grad_qkv, None, None, None, None


def _precision() -> str:
    """How products of fp32 numbers are computed: three TF32 products are about as exact as one in fp32."""
    return "tf32" if uses_tf32() else "tf32x3"


def attention(qkv: Tensor, begins: Tensor, ends: Tensor, heads: int, mask: Mask | None = None) -> Tensor:
    """Causal attention within documents.

    Args:
        qkv: queries, keys and values of all heads, (N, 3 H K); K a power of two, at least 16.
        begins: index of the first token of each token's document, (N,), int32.
        ends: index after the last token of each token's document, (N,), int32.
        heads: H.
        mask: dropout of the attention weights, with keys (H, 2, N); None for no dropout.

    Returns:
        (N, H K).
    """
    return _Attention.apply(qkv, begins, ends, heads, mask)
