"""Next-token cross-entropy with its gradient, in chunks of the targets: all logits never exist at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.net.device import runs_triton

_CHUNK = {"cuda": 4096, "cpu": 512}  # targets whose logits exist at a time
_LANES = 64  # matrix products of odd width are slow: the vocabulary is padded to a multiple of this
_ROWS = 8  # logit rows per thread at a time on a CPU: as many as fit its cache


def padded_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head's weight (V, D) in ``dtype``, with rows of zeros up to a multiple of 64."""
    return F.pad(weight.detach().to(dtype), (0, 0, 0, -weight.size(0) % _LANES))


def _chunks(count: int, device: torch.device) -> Iterator[slice]:
    """Cut ``count`` targets into as few chunks as ``_CHUNK`` allows, all of about one size.

    A short last chunk would need a kernel for another shape, and that kernel would have to be loaded first.
    """
    chunks = max(1, -(-count // _CHUNK[device.type]))
    size = max(1, -(-count // chunks))
    for start in range(0, count, size):
        yield slice(start, start + size)


@torch.no_grad()
def head_loss(
    hidden: Tensor,
    head: Tensor,
    vocabulary: int,
    targets: Tensor,
    weights: Tensor | None = None,
    head_gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses, and its gradient with respect to the hidden states.

    As in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024), the gradient is computed in the forward
    pass, so that the logits of only one chunk exist at a time.

    Args:
        hidden: hidden states of the predicting tokens (M, D), in the dtype to compute in.
        head: ``padded_head`` of the weight.
        vocabulary: V.
        targets: ids to predict (M,).
        weights: of the losses (M,), or None where all are 1.
        head_gradient: (V, D); the gradient with respect to the head's weight is added to it.

    Returns:
        The sum in nats, a float64 scalar, and the gradient (M, D).
    """
    gradient = torch.empty_like(hidden)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    if weights is not None:
        weights = weights.to(torch.promote_types(hidden.dtype, torch.float32))
    for chunk in _chunks(len(targets), hidden.device):
        h = hidden[chunk]
        losses, logit_gradient = cross_entropy(h @ head.t(), targets[chunk], vocabulary)
        if weights is not None:
            losses = losses * weights[chunk]
            logit_gradient *= weights[chunk, None]
        total += losses.sum(dtype=torch.float64)
        torch.mm(logit_gradient, head, out=gradient[chunk])
        if head_gradient is not None:
            head_gradient += _product_for_sums(logit_gradient.t(), h)[:vocabulary]
    return total, gradient


def _product_for_sums(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 where fp16 could overflow: a word's gradient is a sum over all its places in the text."""
    if a.dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, vocabulary: int, targets: Tensor) -> Tensor:
    """Losses in nats (M,), in fp32 at least, of targets (M,) given hidden states (M, D) and ``padded_head``."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=dtype, device=hidden.device)
    for chunk in _chunks(len(targets), hidden.device):
        losses[chunk], _ = cross_entropy(hidden[chunk] @ head.t(), targets[chunk], vocabulary)
    return losses


def cross_entropy(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Losses in nats, in fp32 at least, and their gradient with respect to the logits.

    On a GPU a Triton kernel reads the logits twice and writes once. Measured on an H200 over 13,008 x 50,257
    bf16 logits, products included: see docs/performance.md. On a CPU a few rows are processed at a
    time, so that they stay in the processor's cache: 92 us per row of 50,304 bf16 logits and thread; 371 us with
    all 512 rows at once.

    Args:
        logits: (M, padded V), contiguous, zero beyond the vocabulary; overwritten: undefined afterwards.
        targets: (M,), below ``vocabulary``.
        vocabulary: V.

    Returns:
        Losses (M,), and their gradient (M, padded V), zero beyond the vocabulary.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and runs_triton(logits.device):
        from model.engine import pointwise_kernels

        return pointwise_kernels.cross_entropy(logits, targets, vocabulary), logits
    logits[:, vocabulary:] = -math.inf
    losses = torch.empty(len(targets), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    step = max(1, len(targets)) if logits.is_cuda else _ROWS * torch.get_num_threads()
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        log_p = F.log_softmax(logits[rows], -1, dtype=losses.dtype)
        log_p_target = log_p.gather(1, targets[rows, None])
        losses[rows] = -log_p_target[:, 0]
        # p - 1 is computed before rounding: a p near 1 rounds to 1 in bf16, and the gradient would be 0.
        logits[rows] = log_p.exp_().scatter_(1, targets[rows, None], log_p_target.expm1())
    return losses, logits
