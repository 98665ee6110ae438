"""Compiles a training's kernels in several threads, while the base is read: one after the other they take seconds.

Triton compiles a kernel when it is first launched, and then waits for the compilers. So each kernel is launched once
here, on zeros, with the types that a training has. Kernels that an earlier process compiled are loaded from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from model.engine.fused import has_kernels
from model.engine.loss import padded_head
from model.net.config import GPTConfig
from model.net.noise import Noise

_TOKENS = 512  # a kernel compiled for one number of tokens serves all


@contextmanager
def compiling_ahead(config: GPTConfig, dtype: torch.dtype, device: torch.device, dropout: float) -> Iterator[None]:
    """While the body runs, compile the kernels of a training. Does nothing where there are no own kernels.

    Args:
        config: of the model.
        dtype: computing dtype, whose settings are in force (``model.net.device.use_precision``).
        device: of the training; the caller may use its memory.
        dropout: rate in the blocks that train.
    """
    if not has_kernels(config, device, dtype):
        yield
        return
    work = _launches(config, dtype, device, dropout)
    with ThreadPoolExecutor(len(work), "compile-kernels") as threads:
        for launch in work:
            threads.submit(_try, launch, device)
        yield


def _try(launch: Callable[[], object], device: torch.device) -> None:
    # An error, most often of memory, is the training's to meet, which can do something about it.
    with suppress(Exception), torch.cuda.device(device):
        launch()


def _launches(
    config: GPTConfig, dtype: torch.dtype, device: torch.device, dropout: float
) -> list[Callable[[], object]]:
    """One call for each kernel, or for a few that are compiled quickly; with and without dropout."""
    from model.engine.attention_kernels import attention
    from model.engine.noise_kernels import Mask, masks
    from model.engine.pointwise_kernels import add_norm, bias_gelu, choose, cross_entropy

    width, heads = config.n_embd, config.n_head

    def zeros(*shape: int, trains: bool = True) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=trains)

    def whole(type_: torch.dtype, value: int) -> Tensor:
        return torch.full((_TOKENS,), value, dtype=type_, device=device)

    def back(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
        torch.autograd.grad(outputs, inputs, outputs)

    def launch_attention(mask: Mask | None) -> None:
        qkv = zeros(_TOKENS, 3 * width)
        back(attention(qkv, whole(torch.int32, 0), whole(torch.int32, _TOKENS), heads, mask), qkv)

    def launch_add_norm(mask: Mask | None) -> None:
        x, y, bias = zeros(_TOKENS, width), zeros(_TOKENS, width), zeros(width)
        norm = nn.LayerNorm(width, config.layer_norm_epsilon, device=device, dtype=dtype)
        back(add_norm(x, y, bias, norm, mask), x, y, bias)

    def launch_bias_gelu() -> None:
        x, bias = zeros(_TOKENS, 4 * width), zeros(4 * width)
        back(bias_gelu(x, bias), x, bias)

    def launch_choose() -> None:
        x = zeros(_TOKENS, width)
        back(choose(x, torch.arange(_TOKENS, device=device)), x)

    def launch_loss() -> None:
        logits = zeros(_TOKENS, len(padded_head(zeros(config.vocab_size, 1), dtype)), trains=False)
        cross_entropy(logits, whole(torch.int64, 0), config.vocab_size)

    def launch_with_dropout() -> None:
        noise = Noise(dropout, torch.zeros(2, dtype=torch.int64, device=device), whole(torch.int64, 0))
        of_weights, of_branch, _ = masks(noise, 0, heads)
        launch_add_norm(of_branch)
        launch_attention(of_weights)

    launches: list[Callable[[], object]] = [
        partial(launch_attention, None), partial(launch_add_norm, None), launch_bias_gelu, launch_choose, launch_loss
    ]  # fmt: skip
    return [*launches, launch_with_dropout] if dropout else launches
