"""Triton kernels for the operations between the matrix products of a packed GPT-2, with their gradients.

PyTorch launches a kernel of its own for every residual sum, norm, bias and activation; these kernels join several of
them. docs/performance.md compares the two. All sums have a fixed order.

Shapes: N tokens, D width, M rows chosen or predicted; all inputs contiguous. Imported only where there is a GPU,
as triton may be missing elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.data import packing
from model.engine.noise_kernels import Mask, kept, load_key


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _add_norm_forward(  # type: ignore[no-untyped-def]
    x, y, bias, gain, shift, total, normal, means, scales, keys, rows, width, epsilon, threshold, factor,
    BLOCK: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One row: total = x + dropout(y + bias), and its layer norm."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    value = tl.load(y + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        key, first = load_key(keys, row, rows, row < rows)
        value = tl.where(kept(key, first, lanes.to(tl.uint32), threshold), value * factor, 0.0)
    value += tl.load(x + row * width + lanes, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * width + lanes, rounded, mask=inside)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + epsilon)
    result = centred * scale * tl.load(gain + lanes, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(shift + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(normal + row * width + lanes, result.to(normal.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _add_norm_backward(  # type: ignore[no-untyped-def]
    grad_total, grad_normal, total, gain, means, scales, grad_x, grad_y, partials, keys, rows, width,
    threshold, factor, BLOCK: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Every so many rows: the gradient of the sum's terms, and the sums over rows that bias, gain and shift need."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    slope = tl.load(gain + lanes, mask=inside, other=0.0).to(tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(rows - program, tl.num_programs(0))):
        row = program.to(tl.int64) + step * tl.num_programs(0)
        place = row * width + lanes
        upstream = tl.load(grad_normal + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normal = tl.where(inside, (value - tl.load(means + row)) * scale, 0.0)
        gain_sum += upstream * normal
        shift_sum += upstream
        upstream *= slope
        along = tl.sum(upstream * normal, 0) / width
        gradient = (upstream - tl.sum(upstream, 0) / width - normal * along) * scale
        gradient += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        rounded = gradient.to(grad_x.dtype.element_ty)
        tl.store(grad_x + place, rounded, mask=inside)
        if DROPS:
            key, first = load_key(keys, row, rows, row < rows)
            gradient = tl.where(kept(key, first, lanes.to(tl.uint32), threshold), gradient * factor, 0.0)
            rounded = gradient.to(grad_y.dtype.element_ty)
            tl.store(grad_y + place, rounded, mask=inside)
        bias_sum += tl.where(inside, rounded.to(tl.float32), 0.0)
    partials += program * 3 * width + lanes
    tl.store(partials, bias_sum, mask=inside)
    tl.store(partials + width, gain_sum, mask=inside)
    tl.store(partials + 2 * width, shift_sum, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gelu(x):  # type: ignore[no-untyped-def]
    """0.5 (1 + tanh z) is sigmoid 2z: returns it and z's derivative, for the tanh approximation of GELU."""
    gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return gate, 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit  # type: ignore[untyped-decorator]
def _bias_gelu_forward(x, bias, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of a row."""
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < width
    place = tl.program_id(0).to(tl.int64) * width + lanes
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    gate, _ = _gelu(value)
    tl.store(out + place, (value * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _bias_gelu_backward(grad, x, bias, grad_x, partials, rows, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of every so many rows: the gradient, and its sum over these rows."""
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < width
    shift = tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        place = (tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)) * width + lanes
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + shift
        gate, slope = _gelu(value)
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        rounded = (upstream * gate * (1.0 + 2.0 * value * (1.0 - gate) * slope)).to(grad_x.dtype.element_ty)
        tl.store(grad_x + place, rounded, mask=inside)
        sums += rounded.to(tl.float32)
    tl.store(partials + tl.program_id(0) * width + lanes, sums, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _put_rows(values, index, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row, to its place."""
    row, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    inside = lanes < width
    value = tl.load(values + row.to(tl.int64) * width + lanes, mask=inside)
    tl.store(out + tl.load(index + row) * width + lanes, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(logits, targets, losses, width, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: log-sum-exp in one pass over it, its softmax minus one-hot written over it in a second."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    # Before the barrier: later another warp might have written the gradient over it.
    chosen = tl.load(logits + target).to(tl.float32)
    tl.debug_barrier()
    # Each lane keeps its own maximum and sum: one reduction at the end instead of one a block.
    highest = tl.full([BLOCK], -1e30, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        x = tl.load(logits + start + lanes, mask=start + lanes < vocabulary, other=-1e30).to(tl.float32)
        higher = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
        sums = sums * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(sums * tl.exp(highest - top), 0))
    tl.store(losses + row, log_sum - chosen)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        x = tl.load(logits + start + lanes, mask=inside).to(tl.float32)
        gradient = tl.exp(x - log_sum) - tl.where(start + lanes == target, 1.0, 0.0)
        tl.store(logits + start + lanes, gradient, mask=inside)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that run at a time, about: each sums over its share of the rows; the sums are then added up."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, y: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, epsilon: float, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        rows, width = x.shape
        total, normal = torch.empty_like(x), torch.empty_like(x)
        means, scales = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        ctx.threshold, ctx.factor = (mask.threshold, mask.factor) if mask else (0, 1.0)
        keys = mask.keys if mask else None
        _add_norm_forward[(rows,)](
            x, y, bias, gain, shift, total, normal, means, scales, keys, rows, width, epsilon, ctx.threshold,
            ctx.factor, BLOCK=triton.next_power_of_2(width), DROPS=mask is not None, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(total, gain, means, scales, keys)
        return total, normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_normal: Tensor) -> Any:  # type: ignore[override]
        total, gain, means, scales, keys = ctx.saved_tensors
        rows, width = total.shape
        grad_x = torch.empty_like(total)
        grad_y = grad_x if keys is None else torch.empty_like(total)
        programs = min(rows, _programs(total.device))
        partials = torch.empty(programs, 3, width, dtype=torch.float32, device=total.device)
        _add_norm_backward[(programs,)](
            grad_total.contiguous(), grad_normal.contiguous(), total, gain, means, scales, grad_x, grad_y, partials,
            keys, rows, width, ctx.threshold, ctx.factor, BLOCK=triton.next_power_of_2(width),
            DROPS=keys is not None, num_warps=2,
        )  # fmt: skip
        bias, scale, shift = partials.sum(0).to(gain.dtype)
        return grad_x, grad_y, bias, scale, shift, None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        rows, width = x.shape
        out = torch.empty_like(x)
        _bias_gelu_forward[(rows, triton.cdiv(width, 4096))](x, bias, out, width, BLOCK=4096, num_warps=8)
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        rows, width = x.shape
        grad_x = torch.empty_like(x)
        columns = triton.cdiv(width, 512)
        programs = min(rows, 2 * triton.cdiv(_programs(x.device), columns))
        partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _bias_gelu_backward[(programs, columns)](
            gradient.contiguous(), x, bias, grad_x, partials, rows, width, BLOCK=512, num_warps=4
        )
        return grad_x, partials.sum(0).to(bias.dtype)


def add_norm(
    x: Tensor, y: Tensor, bias: Tensor, norm: nn.LayerNorm, mask: Mask | None = None
) -> tuple[Tensor, Tensor]:
    """x + dropout(y + bias) and its layer norm, both (N, D), from x and y (N, D) and bias (D,).

    Args:
        mask: of the dropout, with keys (2, N); None for no dropout.
    """
    return _AddNorm.apply(x, y, bias, norm.weight, norm.bias, norm.eps, mask)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation) of x + bias, from x (N, W) and bias (W,): (N, W)."""
    return _BiasGelu.apply(x, bias)


def choose(x: Tensor, index: Tensor) -> Tensor:
    """``model.data.packing.choose`` with a kernel of its own for the gradient.

    torch's deterministic way to write rows sorts them first. A row may be chosen more than once if the gradients of
    all its copies are zero.
    """
    return packing.choose(x, index, _write_rows)


def _write_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index] = rows: rows (M, D) to their places in target (N, D)."""
    count, width = rows.shape
    if count:
        _put_rows[(count,)](rows.contiguous(), index, target, width, BLOCK=triton.next_power_of_2(width), num_warps=4)


def cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Losses in nats (M,), fp32, of logits (M, padded V), which are overwritten with their gradient."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    if len(targets):
        _cross_entropy[(len(targets),)](logits, targets, losses, logits.size(1), vocabulary, BLOCK=2048, num_warps=16)
    return losses
