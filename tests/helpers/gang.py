"""Real processes that train together as ranks, and what each of them does: imported by tests and by the processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import GPTModel, freeze_bottom_layers
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.ranks import ALONE, Ranks, join_ranks
from model.engine.trainer import TrainResult
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.net.device import cast_frozen

TIMEOUT = 60.0  # seconds that an exchange, or a call, may take


class GangError(RuntimeError):
    """A call failed on some ranks; the message has all their tracebacks."""


class Gang:
    """Ranks in processes of their own, which call functions together.

    Args:
        world: number of ranks.
        device: cpu or cuda.
        hosts: number of hosts that the ranks pretend to be on.
    """

    def __init__(self, world: int, device: str = "cpu", hosts: int = 1):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            numbers = (rank, world, rank % (world // hosts), world // hosts)
            process = context.Process(target=_serve, args=(theirs, numbers, port, device), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call function(ranks, ...) on all ranks."""
        for pipe in self.pipes:
            pipe.send((function, arguments, options))

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """What function(ranks, ...) returns, in the order of the ranks.

        Raises:
            GangError: it raised somewhere.
        """
        self.start(function, *arguments, **options)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(2 * TIMEOUT), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        if failed := [answer for worked, answer in answers if not worked]:
            raise GangError("\n".join(failed))
        return [answer for _, answer in answers]

    def wait_for_death(self) -> None:
        """Wait until the first process has died, then end the others, as a launcher does."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], TIMEOUT)
        assert not all(process.is_alive() for process in self.processes)
        self.end()

    def end(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, numbers: tuple[int, ...], port: int, device: str) -> None:
    """In a process: become a rank and answer calls until the pipe is closed."""
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with join_ranks(torch.device(device), TIMEOUT) as ranks:
        while True:
            try:
                function, arguments, options = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, function(ranks, *arguments, **options)))
            except Exception:
                pipe.send((False, f"rank {ranks.rank}: {traceback.format_exc()}"))


@dataclass(frozen=True)
class Training:
    """A tiny training, and what happens to it.

    Attributes:
        base: directory of the model.
        tokens: directory of the tokens.
        config: settings of ``TrainConfig``.
        unfrozen: blocks that train; None trains everything.
        train_head: whether an untied head trains.
        double: compute in float64.
        cache: settings of ``TrunkCacheConfig``.
        stop: (rank, step): this rank wants to stop before this step.
        kill: (rank, step): this rank is killed when it has queued this step.
        spoil: (rank, step, value): before this step this rank adds the value to a weight.
        poison: (rank, step): in this step this rank's gradient is not finite.
        hold: outputs must be kept in this place.
    """

    base: Path
    tokens: Path
    config: dict[str, Any]
    unfrozen: int | None = 1
    train_head: bool = False
    double: bool = True
    cache: dict[str, Any] = field(default_factory=dict)
    stop: tuple[int, int] | None = None
    kill: tuple[int, int] | None = None
    spoil: tuple[int, int, float] | None = None
    poison: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training ended on a rank.

    Attributes:
        weights: all weights at the end by name.
        result: None if it raised.
        error: name of the type and message of what it raised; empty if it raised nothing.
        asked: how often the rank was asked whether to stop.
        warnings: messages to ``warn``.
    """

    weights: dict[str, np.ndarray[Any, Any]]
    result: TrainResult | None
    error: str
    asked: int
    warnings: list[str]


def build(training: Training, device: torch.device) -> GPTModel:
    """The model, fresh."""
    model = GPTModel.from_pretrained(training.base).to(device)
    if training.unfrozen is not None:
        freeze_bottom_layers(model, training.unfrozen, training.train_head)
    if training.double:
        return model.double()
    cast_frozen(model, torch.bfloat16)
    return model


def run_training(ranks: Ranks, training: Training, directory: Path) -> Outcome:
    """Train on this rank; what a ``Training`` says may happen does."""
    model = build(training, ranks.device)
    asked, warnings = 0, list[str]()

    def should_stop() -> bool:
        nonlocal asked
        step, asked = asked, asked + 1
        if training.kill == (ranks.rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        if training.spoil is not None and training.spoil[:2] == (ranks.rank, step):
            model.ln_f.bias.data[3] += training.spoil[2]
        if training.poison == (ranks.rank, step):
            _poison_next_pass()
        return training.stop == (ranks.rank, step)

    result, error = None, ""
    try:
        result = train(
            model,
            training.tokens,
            TrainConfig(**training.config),
            directory,
            "me",
            warn=warnings.append,
            cache=TrunkCacheConfig(**training.cache),
            should_stop=should_stop,
            ranks=ranks,
        )
    except (RuntimeError, ArithmeticError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    except Exception as raised:
        if type(raised).__name__ != "TrainingStoppedError":
            raise
        error = f"{type(raised).__name__}: {raised}"
    weights = {name: p.detach().float().cpu().numpy() for name, p in model.named_parameters() if not training.double}
    weights |= {name: p.detach().cpu().numpy() for name, p in model.named_parameters() if training.double}
    return Outcome(weights, result, error, asked, warnings)


def run_alone(training: Training, directory: Path) -> Outcome:
    """The same training in this process, in a world of one."""
    return run_training(ALONE, training, directory)


def _poison_next_pass() -> None:
    """Let the loss of this process's next pass be not a number."""
    plain = Engine.forward_backward

    def poisoned(self: Engine, *arguments: Any) -> torch.Tensor:
        Engine.forward_backward = plain  # type: ignore[method-assign]
        return plain(self, *arguments) * float("nan")

    Engine.forward_backward = poisoned  # type: ignore[method-assign]
