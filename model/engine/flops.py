"""Operations that a training needs, and those that the hardware can do: their ratio is the MFU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from model.net.config import GPTConfig

_WINDOWS = 5
_WINDOW_SECONDS = 0.02


def necessary_flops(
    config: GPTConfig,
    num_frozen: int,
    tokens: int,
    target_tokens: int,
    trunk_tokens: int,
    train_head: bool = False,
) -> float:
    """Floating-point operations that a training on some tokens needs at least.

    Counted are the matrix products of linear layers, a multiply-add as two operations (Kaplan et al. 2020, section
    2.1: 12 D^2 weights per block, 2 operations per weight and token forward, 4 backward; Chowdhery et al. 2022, PaLM,
    appendix B). Not counted: attention scores, norms, activations, the optimizer, padding, anything computed twice,
    and results that are never used: in the last block everything after its attention (9 of its 12 D^2 weights) at
    tokens that predict no target, and the gradient of the lowest trained block's input.

    Args:
        config: shape of the model.
        num_frozen: number of blocks of the trunk.
        tokens: real tokens that passed the trained blocks, forward and backward, without the last token of each row,
            which is only predicted.
        target_tokens: number of targets, which is that of the tokens at which the head is needed.
        trunk_tokens: tokens whose trunk output was computed; 0 if all were in the cache.
        train_head: whether an untied head trains, so that the gradient of its weight is needed too.
    """
    block = 12 * config.n_embd**2
    trunk = 2 * num_frozen * block * trunk_tokens
    trained = 6 * (config.n_layer - num_frozen) * block * tokens
    if num_frozen < config.n_layer:
        trained -= 6 * 9 * config.n_embd**2 * (tokens - target_tokens)
        if num_frozen:
            trained -= 2 * 3 * config.n_embd**2 * tokens
    head = (6 if train_head else 4) * config.n_embd * config.vocab_size * target_tokens
    return float(trunk + trained + head)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, in the best of a few windows; takes some 0.2 s.

    The size is 8192^3 on a GPU and 1024^3 elsewhere, or 256^3 if the processor is too slow for that. The best window
    counts because other processes can only slow a window down; a small product is slowed down more. The values are
    random: zeros need less power, and run faster than any training could.
    """
    size = 8192 if device.type == "cuda" else 256
    a, b = _factors(size, device, dtype)
    _seconds(a, b, 1)  # the first product loads the library
    if device.type != "cuda" and _seconds(a, b, 1, clock=time.thread_time) * 4**3 < 0.5:
        size = 1024
        a, b = _factors(size, device, dtype)
    repeats = max(1, int(_WINDOW_SECONDS / _seconds(a, b, 1)))
    seconds = min(_seconds(a, b, repeats) for _ in range(_WINDOWS))
    return 2 * size**3 * repeats / seconds


def _factors(size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random matrices, drawn from a separate generator: a measurement must not change dropout's noise."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    return a, b


def _seconds(a: torch.Tensor, b: torch.Tensor, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that some products take; on a GPU measured by its own clock, so that launches are not counted.

    The second factor is transposed, as in a linear layer: bf16 products without it are slow on some processors.
    """
    if not a.is_cuda:
        start = clock()
        for _ in range(repeats):
            torch.mm(a, b.t())
        return clock() - start
    with torch.cuda.device(a.device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            torch.mm(a, b.t())
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3
