"""Runs each setting in a process of its own, which keeps peak memory, compile caches and crashes separate."""

from __future__ import annotations

import argparse
import importlib
import math
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
from typing import Any, TypeVar

import torch

Number = TypeVar("Number", int, float)


class ChildError(RuntimeError):
    """A function failed in its child process; the message says how."""


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """End the benchmark with a one-line message if the command line, a file or the device is unusable."""
    try:
        yield
    except (ValueError, OSError, ChildError) as error:
        sys.exit(str(error))


def positive(text: str) -> int:
    """Parse an argument of the command line: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def share(text: str) -> float:
    """Parse an argument of the command line: a number from 0 to below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return number


def not_negative(text: str) -> float:
    """Parse an argument of the command line: a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return number


def parse_list(parse: Callable[[str], Number], text: str) -> list[Number]:
    """Parse an argument of the command line: values separated by commas."""
    return [parse(part) for part in text.split(",")]


def quiet_environment() -> None:
    """Set environment variables that child processes inherit; call it before the libraries that read them load."""
    # GPUs are then counted through NVML, which does not initialise CUDA, so forked children can still use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")


def show_one_gpu(device: str) -> None:
    """Hide all GPUs except one, which is ``cuda`` from then on: a Trainer uses all the GPUs that it sees.

    Args:
        device: cuda or cuda:N.
    """
    index = int(device.partition(":")[2] or 0)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = shown.split(",")[index] if shown else str(index)


def import_all(modules: Sequence[str]) -> None:
    """Import modules in this process, so that children forked later need not.

    Raises:
        ImportError: one of them is not installed.
    """
    for module in modules:
        importlib.import_module(module)


def run_apart(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """Call a function in a child process and return what it returns.

    The child is forked, so that it need not import anything again. If CUDA is initialised here, it would not work in
    a fork, and the child is a fresh interpreter.

    Args:
        function: importable by name, as its arguments and result must be picklable.
        timeout: seconds after which the child is killed.

    Raises:
        ChildError: the function raised, ran out of memory or time, or its process died.
    """
    context: Any = multiprocessing.get_context("spawn" if _fork_breaks_cuda() else "fork")
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
            if child.is_alive():  # it has answered, but a thread or child of its own keeps it from ending
                child.kill()
                child.join()
    if not worked:
        raise ChildError(value)
    return value


def _fork_breaks_cuda() -> bool:
    """Whether CUDA is initialised in this process, so that a forked child could not use it."""
    if not torch.cuda.is_available():
        return False
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        sender.send(torch.cuda._is_in_bad_fork())
        os._exit(0)
    broken = bool(receiver.recv())
    os.waitpid(pid, 0)
    return broken


def _call(sender: Connection, scratch: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the child: call the function, and send (True, result) or (False, error message)."""
    os.dup2(2, 1)  # what libraries print goes to standard error; standard output is the benchmark's
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
