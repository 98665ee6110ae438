"""How much arithmetic a training cannot avoid, and how much the hardware could do: the two sides of MFU."""

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
    """Floating-point operations that training on some tokens cannot avoid.

    Matrix products of linear layers only, a multiply-add counted as two (Kaplan et al. 2020, section 2.1:
    12 D^2 weights a block, 2 operations a weight and token forward, 4 backward; Chowdhery et al. 2022, PaLM,
    appendix B). Not counted: attention's own scores, norms and activations, the optimizer, anything computed
    twice, padding; nor what nobody reads: in the last block all behind its attention (9 of its 12 D^2 weights) at
    tokens that bear no loss, and the gradient of the lowest trained block's input.

    Args:
        config: the model's shape.
        num_frozen: blocks of the trunk.
        tokens: real tokens that passed the trained blocks, forward and backward; a row's last one is only predicted.
        target_tokens: those of them that bear loss: the head is needed there only.
        trunk_tokens: tokens whose trunk output had to be computed; 0 where all were remembered.
        train_head: an untied head trains, so that its weight gradient is needed too.
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
    """Operations per second that a large square matrix product reaches, in the best of a few windows.

    8192^3 on a GPU, 1024^3 elsewhere (256^3 where the processor is too slow for that); takes some 0.2 s.
    Work of other processes only ever slows a window down, and the smaller the product, the more.
    Random values: zeros draw less power and run faster than any training would.
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
    """Drawn from a generator of their own: a measurement must not move dropout's noise."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    return a, b


def _seconds(a: torch.Tensor, b: torch.Tensor, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a number of products take; on a GPU by its own clock, so that no launch is counted.

    The second factor is transposed, as in a linear layer: without that, bf16 products of some processors are slow.
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
