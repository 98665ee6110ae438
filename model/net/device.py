"""Where and in which precision the model computes."""

from __future__ import annotations

import functools
import os
import resource
import sys
from contextlib import AbstractContextManager

import torch

from model.net.gpt import GPTModel

PRECISIONS = ("auto", "bf16", "fp32")

# On a CPU, what oneDNN and PyTorch's layer over it build for a shape of bf16 products is kept, up to 4 MB of it for
# each of 1,024 shapes, and packs seldom have one shape twice (pytorch#98688). Both read these at their first product.
PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
for _cache in PRODUCT_CACHES:
    os.environ.setdefault(_cache, "64")


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: a GPU is asked for that torch does not see.
    """
    resolved = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is asked for, but torch sees no GPU: use device=cpu or auto")
    if resolved.type != "cuda":
        return resolved
    # One name for one device.
    resolved = torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)
    if resolved.index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return resolved


def device_choices(device: str) -> list[torch.device]:
    """The devices that would do, best first: ``auto`` and ``cuda`` mean any GPU of the host.

    Raises:
        ValueError: as resolve_device.
    """
    first = resolve_device(device)
    if first.type != "cuda" or device not in ("auto", "cuda"):
        return [first]
    others = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [first, *(other for other in others if other != first)]


def device_key(device: torch.device) -> str:
    """A name of the physical device, whatever number CUDA_VISIBLE_DEVICES gives it."""
    return f"gpu {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int:
    """Bytes this process held at most: on a GPU in torch's allocator, on a CPU resident.

    Reserved, not allocated: what CUDA graphs compute with is not allocated any more once they are captured.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def let_memory_grow(device: torch.device) -> None:
    """Have torch's allocator extend a GPU's segments in place, where the driver can and nobody chose otherwise.

    Packs differ in size from step to step: a segment that cannot grow is left behind for the first that is larger.
    """
    if any(name.startswith("PYTORCH_") and name.endswith("ALLOC_CONF") for name in os.environ):
        return
    # At run time, not by PYTORCH_ALLOC_CONF: some virtual GPUs and WSL fail at the first allocation (pytorch#192330).
    choose = torch._C._accelerator_setAllocatorSettings
    choose("expandable_segments:True")
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # where no memory is at hand already
            torch.empty(1, device=device)
    except RuntimeError:
        choose("expandable_segments:False")


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a process: cuBLAS keeps 32 MiB for each stream it ever ran on, twice with autograd."""
    return torch.cuda.Stream(device)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a GPU's memory is full: torch's allocator, or CUDA, a library or Triton beside it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")
    )


def give_memory_back() -> None:
    """Return to the GPU what torch's allocator holds unused.

    Not before all that was queued has run: a graph's memory counts as unused once the graph is gone, though it runs.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 where the hardware multiplies it, else fp32.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cast_frozen(model: GPTModel, dtype: torch.dtype) -> None:
    """Store frozen parameters in ``dtype``; trained ones stay fp32, and a tied head stays tied."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision for a forward pass; does nothing in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
