"""Device and precision."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from model import GPTModel
from model.net import device
from model.net.device import (
    autocast,
    cast_frozen,
    count_processes,
    describe_device,
    let_memory_grow,
    processor_name,
    resolve_device,
    resolve_precision,
    use_precision,
    uses_tf32,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def test_device_names() -> None:
    """auto is the GPU if the machine has one; a GPU that is missing is an error with a remedy."""
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'cuda' is not available.*device=cpu"):
            resolve_device("cuda")


def test_a_cpu_is_described_by_what_its_results_depend_on() -> None:
    """Name, instructions and threads; they are the same when they are asked for again."""
    found = describe_device(CPU)
    assert found == describe_device(CPU)
    assert (found["kind"], found["name"], found["threads"]) == ("cpu", processor_name(), torch.get_num_threads())
    assert found["name"]
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on each GPU, and at most as many as there are. Three GPUs are made up here."""
    three = [torch.device("cuda", index) for index in range(3)]
    monkeypatch.setattr(device, "device_choices", lambda name: three[1:2] if name == "cuda:1" else three)
    assert [count_processes("auto", gpus) for gpus in (1, 3, "all")] == [1, 3, 3]
    assert count_processes("cuda:1", "all") == 1
    with pytest.raises(ValueError, match=r"^gpus 4 is too many: torch sees 3 GPUs: use fewer, or gpus=all$"):
        count_processes("cuda", 4)
    with pytest.raises(ValueError, match=r"^gpus 2 is too many: device 'cuda:1' is one GPU: use device=cuda$"):
        count_processes("cuda:1", 2)


def test_number_of_processes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one for each processor that this process may use, or two. The processors are made up here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [count_processes("auto", gpus) for gpus in (1, "all")] == [1, 1]
    with pytest.raises(ValueError, match=r"^gpus 2 is too many: torch sees no GPU: use gpus=1, or device=cpu for 2 "):
        count_processes("auto", 2)
    for processors, most in ((8, 8), (1, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processors: {*range(count)}, raising=False)
        assert [count_processes("cpu", gpus) for gpus in (1, most, "all")] == [1, most, 1]
        expected = f"^gpus 1000 is too many: .* has processors for {most}: use gpus={most} or fewer$"
        with pytest.raises(ValueError, match=expected):
            count_processes("cpu", 1000)


def test_precision_names() -> None:
    """fp32, fp16 and bf16 give these dtypes, auto one of them on a CPU; what is unknown or missing is refused."""
    assert resolve_precision("fp32", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    assert resolve_precision("fp16", CPU) == torch.float16
    with pytest.raises(ValueError, match="precision 'int8' is none of auto, bf16, fp16, fp32, tf32"):
        resolve_precision("int8", CPU)
    with pytest.raises(ValueError, match="precision tf32 needs a GPU that has TF32, and device is cpu: use fp32"):
        resolve_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("capability", "has_bf16", "want"),
    [((9, 0), True, torch.bfloat16), ((7, 5), False, torch.float16), ((6, 1), False, torch.float32)],
    ids=["H100", "T4", "GTX 1080"],
)
def test_auto_on_gpus_of_any_age(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_bf16: bool, want: torch.dtype
) -> None:
    """bf16 where the GPU has it, else fp16 where it is fast, else fp32. Mocks the answers of GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert resolve_precision("auto", torch.device("cuda", 0)) == want
    if capability < (8, 0):
        with pytest.raises(ValueError, match="needs a GPU that has TF32"):
            resolve_precision("tf32", torch.device("cuda", 0))


def test_tf32_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 after tf32 in one process is exact again. Mocks the answer of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert use_precision("tf32", torch.device("cuda", 0)) == torch.float32
    assert uses_tf32()
    assert use_precision("fp32", torch.device("cuda", 0)) == torch.float32
    assert not uses_tf32()


def test_cast_frozen_leaves_the_trained_in_fp32(tiny_model: GPTModel) -> None:
    """Frozen parameters are stored in bf16, and the tied head stays tied."""
    cast_frozen(tiny_model, torch.bfloat16)
    for name, parameter in tiny_model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert tiny_model.lm_head.weight is tiny_model.wte.weight
    assert tiny_model.lm_head.weight.data_ptr() == tiny_model.wte.weight.data_ptr()


def test_autocast_acts_in_bf16_only() -> None:
    """Products are bf16 under autocast in bf16, and fp32 under autocast in fp32."""
    x = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16


_SHAPES = """
import torch
import model.engine.training
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) / 1024
weight, x = torch.randn(64, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
for rows in range(200, 1000):
    torch.nn.functional.linear(x[:rows], weight)
    if rows == 400:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report resident memory")
def test_memory_does_not_grow_with_the_shapes_of_products() -> None:
    """600 further pack sizes take less than 100 MB; with unlimited caches they take nearly 400 MB."""
    if resolve_precision("auto", torch.device("cpu")) != torch.bfloat16:
        pytest.skip("this processor has no bf16 products")
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", _SHAPES], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


@pytest.mark.parametrize(("variable", "fails", "chosen"), [
    (None, False, ["expandable_segments:True"]),
    (None, True, ["expandable_segments:True", "expandable_segments:False"]),
    ("PYTORCH_ALLOC_CONF", False, []),
    ("PYTORCH_CUDA_ALLOC_CONF", False, []),
])  # fmt: skip
def test_segments_grow_where_the_driver_can(
    variable: str | None, fails: bool, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mocks a GPU, with a driver that lacks virtual memory management in one case: neither exists here."""
    settings: list[str] = []

    def allocate(*_: object, **__: object) -> None:
        if fails:
            raise RuntimeError("CUDA driver error: operation not supported")

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", allocate)
    let_memory_grow.__wrapped__(torch.device("cuda", 0))  # without the cache, which allows one call per process
    assert settings == chosen
