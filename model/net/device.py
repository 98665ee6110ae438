"""Device and precision of the computation, and settings of torch's memory."""

from __future__ import annotations

import functools
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.available import available_processors

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "tf32")
_WITH_FP16 = (7, 0)  # compute capability of the oldest GPUs with fast products of fp16 (Volta)
_WITH_TF32 = (8, 0)  # and of TF32 (Ampere)
_WITH_TRITON = (8, 0)  # and of those that Triton supports

# On a CPU, oneDNN and PyTorch's layer over it each cache what they build for a shape of bf16 products: up to 4 MB for
# each of 1,024 shapes (pytorch#98688). Packs seldom repeat a shape. Both read these variables at their first product.
PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
for _cache in PRODUCT_CACHES:
    os.environ.setdefault(_cache, "64")


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU.

    Raises:
        ValueError: ``device`` names a GPU that torch does not see.
    """
    resolved = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available, torch sees no GPU: use device=cpu or auto")
    if resolved.type != "cuda":
        return resolved
    # With an index, so that each device has exactly one name.
    resolved = torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)
    if resolved.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {device!r} is not available, torch sees {count} GPUs: use one of them, or auto")
    return resolved


def device_choices(device: str) -> list[torch.device]:
    """The devices that satisfy ``device``, preferred first: ``auto`` and ``cuda`` mean any GPU of the host.

    Raises:
        ValueError: as resolve_device.
    """
    first = resolve_device(device)
    if first.type != "cuda" or device not in ("auto", "cuda"):
        return [first]
    others = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [first, *(other for other in others if other != first)]


def count_processes(device: str, gpus: int | str) -> int:
    """How many processes train: one on each GPU; with ``device=cpu`` as many as are asked for, up to one a processor.

    Two are possible on any CPU, to try what several GPUs do.

    Args:
        device: auto, cpu, cuda or cuda:N.
        gpus: a number; or "all": the GPUs that satisfy ``device``, and 1 on a CPU.

    Raises:
        ValueError: fewer GPUs satisfy ``device``, or the CPU has fewer processors; or as resolve_device.
    """
    choices = device_choices(device)
    if gpus == "all":
        return len(choices)
    if device == "auto" and choices[0].type == "cpu" and int(gpus) > 1:
        raise ValueError(
            f"gpus {gpus} is too many: torch sees no GPU: use gpus=1, or device=cpu for {gpus} processes on the CPU"
        )
    if choices[0].type == "cuda" and int(gpus) > len(choices):
        if device.startswith("cuda:"):
            raise ValueError(f"gpus {gpus} is too many: device {device!r} is one GPU: use device=cuda")
        raise ValueError(f"gpus {gpus} is too many: torch sees {len(choices)} GPUs: use fewer, or gpus=all")
    if choices[0].type == "cpu" and int(gpus) > (most := max(2, available_processors())):
        raise ValueError(
            f"gpus {gpus} is too many: on a CPU each is a process, and this one has processors for {most}: use "
            f"gpus={most} or fewer"
        )
    return int(gpus)


def device_key(device: torch.device) -> str:
    """A name of the physical device that does not depend on CUDA_VISIBLE_DEVICES."""
    return f"gpu {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else str(device)


def describe_device(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on: kind and name of a device, instructions and threads of a CPU."""
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), list(torch.cuda.get_device_capability(device))
        return {"kind": "cuda", "name": name, "capability": capability}
    threads = torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"kind": device.type, "name": processor_name(), "instructions": instructions, "threads": threads}


def processor_name() -> str:
    """Name of the processor, as Linux or else Python reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: reserved by torch's allocator on a GPU, resident on a CPU.

    Reserved, not allocated: the memory of a CUDA graph no longer counts as allocated once the graph is captured.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def pin(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array as a tensor, in pinned memory if it is for a GPU: a copy from other memory waits for queued work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device, without waiting for the work that is queued there."""
    return pin(array, device).to(device, non_blocking=True)


@functools.cache
def let_memory_grow(device: torch.device) -> None:
    """Let torch's allocator extend a GPU's segments in place, if the driver can and no PYTORCH_*ALLOC_CONF is set.

    Packs differ in size from step to step. Without this, a larger pack needs a new segment, and the old one is left
    unused.
    """
    if any(name.startswith("PYTORCH_") and name.endswith("ALLOC_CONF") for name in os.environ):
        return
    # At run time, not by PYTORCH_ALLOC_CONF: some virtual GPUs and WSL fail at the first allocation (pytorch#192330).
    choose = torch._C._accelerator_setAllocatorSettings
    choose("expandable_segments:True")
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # new: no memory is cached for it
            torch.empty(1, device=device)
    except RuntimeError:
        choose("expandable_segments:False")


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a process are captured.

    One stream, because cuBLAS keeps 32 MiB for each stream that it ever ran on, twice with autograd.
    """
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run the body on a stream other than the current one, as CUDA requires for a capture."""
    stream, current = _capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch's allocator, CUDA, a CUDA library or Triton means that a GPU's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")
    )


def give_memory_back() -> None:
    """Return the unused memory of torch's allocator to the GPU, after all queued work has finished.

    The memory of a deleted graph counts as unused although the graph may still be running.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation.

    ``auto`` is bf16 where the hardware has bf16 products, fp16 on older GPUs that have fast ones of it, else fp32.

    Raises:
        ValueError: an unknown name, or the device has no TF32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if precision == "tf32" and capability < _WITH_TF32:
        raise ValueError(f"precision tf32 needs a GPU that has TF32, and device is {device}: use fp32")
    if precision == "auto":
        if device.type == "cuda":
            half = "fp16" if capability >= _WITH_FP16 else "fp32"
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else half
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def use_precision(precision: str, device: torch.device) -> torch.dtype:
    """``resolve_precision``, and products of fp32 matrices use TF32 in this process if and only if it is asked for.

    Raises:
        ValueError: as resolve_precision.
    """
    dtype = resolve_precision(precision, device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return dtype


def uses_tf32() -> bool:
    """Whether products of fp32 matrices use TF32 on a GPU."""
    return torch.get_float32_matmul_precision() != "highest"


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and supports the GPU."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= _WITH_TRITON


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen parameters in ``dtype``; trained ones stay fp32, and a tied head stays tied."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision for a forward pass; does nothing in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
