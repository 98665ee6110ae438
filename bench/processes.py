"""Each setting in a process of its own, so that peak memory, compile caches and crashes are its own too."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class ChildError(RuntimeError):
    """A function that was run apart failed, and in which way."""


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """What is wrong with the command line, its files or the device ends the benchmark with a sentence."""
    try:
        yield
    except (ValueError, OSError, ChildError) as error:
        sys.exit(str(error))


def positive(text: str) -> int:
    """An argument of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def quiet_environment() -> None:
    """Settings that the processes inherit; to be called before a library that heeds them is imported."""
    # Tools that count GPUs through the driver's own library leave CUDA untouched, and forked children may use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")


def show_one_gpu(device: str) -> None:
    """Hide all GPUs but one, which is ``cuda`` from then on: a Trainer would spread its work over all it sees.

    Args:
        device: cuda or cuda:N.
    """
    index = int(device.partition(":")[2] or 0)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[index] if shown else str(index)


def import_all(modules: Sequence[str]) -> None:
    """Import modules here, once for all children that are forked later.

    Raises:
        ImportError: one of them is not installed.
    """
    for module in modules:
        importlib.import_module(module)


def run_apart(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """Call a function in a child process and return what it returns.

    The child is forked, so that it need not import anything again; a fresh interpreter where CUDA would refuse
    to work in a fork.

    Args:
        function: importable by name, as its arguments and result must be picklable.
        timeout: seconds after which the child is killed.

    Raises:
        ChildError: the function raised, ran out of memory or time, or its process died.
    """
    context: Any = multiprocessing.get_context("spawn" if _fork_spoils_cuda() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as scratch:
        child = context.Process(target=_call, args=(sender, Path(scratch), function, arguments))
        child.start()
        sender.close()  # else the end of the child would not end the pipe
        try:
            if receiver.poll(timeout):
                worked, value = receiver.recv()
            else:
                child.kill()
                worked, value = False, f"not done after {timeout:.0f} s"
        except EOFError:
            child.join()
            worked, value = False, _cause_of_death(child.exitcode)
        finally:
            child.join(10)
            if child.is_alive():  # it has answered, but something of its own keeps it from ending
                child.kill()
                child.join()
    if not worked:
        raise ChildError(value)
    return value


def _fork_spoils_cuda() -> bool:
    """Whether this process has already set CUDA up, which a forked child cannot use."""
    if not torch.cuda.is_available():
        return False
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        sender.send(torch.cuda._is_in_bad_fork())
        os._exit(0)
    spoilt = bool(receiver.recv())
    os.waitpid(pid, 0)
    return spoilt


def _call(sender: Connection, scratch: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the child: run, and send (True, result) or (False, what went wrong)."""
    os.dup2(2, 1)  # libraries print; standard output is the benchmark's
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
    tempfile.tempdir = str(scratch)
    try:
        sender.send((True, function(*arguments)))
    except torch.OutOfMemoryError:
        sender.send((False, "out of memory"))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        sender.send((False, f"{type(error).__name__}: {lines[0][:300]}"))


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"the process ended with status {exitcode}"
