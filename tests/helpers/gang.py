"""Real processes that train together as ranks, and what each of them does: imported by tests and by the processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import GPTModel, freeze_bottom_layers
from model.data.tokens import CodeAlpacaDataset
from model.engine import saving, trunk
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.journal import read_journal
from model.engine.ranks import ALONE, Ranks, join_ranks
from model.engine.scoring import row_losses
from model.engine.trainer import Trainer, TrainResult
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.engine.trunk_filling import fill_together
from model.net.device import cast_frozen, resolve_precision

TIMEOUT = 180.0  # seconds that an exchange, or the start of a gang, may take on a busy machine


class GangError(RuntimeError):
    """A call failed on some ranks; the message has all their tracebacks."""


class Gang:
    """Ranks in processes of their own, which call functions together.

    Args:
        world: number of ranks.
        device: cpu or cuda.
        hosts: number of hosts that the ranks pretend to be on.
        timeout: seconds that an exchange may take.
    """

    def __init__(self, world: int, device: str = "cpu", hosts: int = 1, timeout: float = TIMEOUT):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            numbers = (rank, world, rank % (world // hosts), world // hosts)
            process = context.Process(target=_serve, args=(theirs, numbers, port, device, timeout), daemon=True)
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

    def wait_for_death(self) -> list[bool]:
        """Wait until a process has ended; whether each has."""
        ended = connection.wait([process.sentinel for process in self.processes], TIMEOUT)
        assert ended
        return [process.sentinel in ended for process in self.processes]

    def answers_of_survivors(self) -> list[Any]:
        """What the call returned where no process died; then all processes are ended, as a launcher does."""
        dead = self.wait_for_death()
        pipes = [pipe for pipe, is_dead in zip(self.pipes, dead, strict=True) if not is_dead]
        assert all(pipe.poll(TIMEOUT) for pipe in pipes)
        answers = [pipe.recv() for pipe in pipes]
        self.end()
        return [answer for _, answer in answers]

    def end(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, numbers: tuple[int, ...], port: int, device: str, timeout: float) -> None:
    """In a process: become a rank and answer calls until the pipe is closed."""
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(number) for name, number in zip(names, numbers, strict=True)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with join_ranks(torch.device(device), timeout) as ranks:
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
        stop_early: (rank, number): this rank wants to stop when it is asked for this time before the first step.
        kill: (rank, step): this rank is killed when it has queued this step.
        spoil: (rank, step, value): before the checkpoint of this step this rank adds the value to a weight.
        poison: (rank, step): in this step this rank's gradient is not finite.
        starve: (rank, step): in this step this rank's memory is full.
        odd: this rank starts with another frozen weight.
        from_files: outputs of the trunk are read from files, where there are any.
    """

    base: Path
    tokens: Path
    config: dict[str, Any]
    unfrozen: int | None = 1
    train_head: bool = False
    double: bool = True
    cache: dict[str, Any] = field(default_factory=dict)
    stop: tuple[int, int] | None = None
    stop_early: tuple[int, int] | None = None
    kill: tuple[int, int] | None = None
    spoil: tuple[int, int, float] | None = None
    poison: tuple[int, int] | None = None
    starve: tuple[int, int] | None = None
    odd: int | None = None
    from_files: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a training ended on a rank.

    Attributes:
        weights: all weights at the end by name.
        result: None if it raised.
        error: name of the type and message of what it raised; empty if it raised nothing.
        asked: how often the rank was asked before a step whether to stop.
        asked_early: how often it was asked before the first step, while the frozen blocks' outputs and the base's
            validation were computed.
        warnings: messages to ``warn``.
    """

    weights: dict[str, np.ndarray[Any, Any]]
    result: TrainResult | None
    error: str
    asked: int
    asked_early: int
    warnings: list[str]


def build(training: Training, device: torch.device) -> GPTModel:
    """The model, fresh."""
    model = GPTModel.from_pretrained(training.base).to(device)
    if training.unfrozen is not None:
        freeze_bottom_layers(model, training.unfrozen, training.train_head)
    if training.double:
        return model.double()
    cast_frozen(model, resolve_precision(training.config.get("precision", "fp32"), device))
    return model


def run_training(ranks: Ranks, training: Training, directory: Path) -> Outcome:
    """Train on this rank; what a ``Training`` says may happen does."""
    model = build(training, ranks.device)
    trunk._READ_BYTES = 1e30 if training.from_files else 1e9
    saving._SECONDS_BETWEEN = 0.0  # else a tiny training on a GPU writes its last checkpoint only
    if training.odd == ranks.rank:
        model.wte.weight.data[5, 7] += 1e-3
    asked, asked_early, is_early, warnings = 0, 0, False, list[str]()
    plain, plain_save = Trainer.check_stop, Trainer.save

    def check_stop(trainer: Trainer) -> None:
        nonlocal is_early
        is_early = True
        plain(trainer)
        is_early = False

    def save(trainer: Trainer) -> None:
        if training.spoil is not None and training.spoil[:2] == (ranks.rank, trainer.state.step):
            model.ln_f.bias.data[3] += training.spoil[2]
        plain_save(trainer)

    def should_stop() -> bool:
        nonlocal asked, asked_early
        if is_early:
            asked_early += 1
            return training.stop_early == (ranks.rank, asked_early - 1)
        step, asked = asked, asked + 1
        if training.kill == (ranks.rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        if training.poison == (ranks.rank, step):
            _replace_next_pass(lambda loss: loss * float("nan"))
        if training.starve == (ranks.rank, step):
            _replace_next_pass(_run_out_of_memory)
        return training.stop == (ranks.rank, step)

    result, error = None, ""
    Trainer.check_stop, Trainer.save = check_stop, save  # type: ignore[method-assign]
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
    finally:
        Trainer.check_stop, Trainer.save = plain, plain_save  # type: ignore[method-assign]
    weights = {name: p.detach().float().cpu().numpy() for name, p in model.named_parameters() if not training.double}
    weights |= {name: p.detach().cpu().numpy() for name, p in model.named_parameters() if training.double}
    return Outcome(weights, result, error, asked, asked_early, warnings)


def metrics_of(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics of a journal, but for those that depend on the clock."""
    clocked = ("train/tokens_per_second", "train/mfu")
    lines = read_journal(directory / "metrics.jsonl")
    return [(line["step"], {k: v for k, v in line["metrics"].items() if k not in clocked}) for line in lines]


def assert_equal(got: Path, want: Path, outcomes: list[Outcome], wanted: list[Outcome]) -> None:
    """Journals, and weights of all ranks, are equal bit for bit."""
    assert metrics_of(got) == metrics_of(want)
    for outcome in outcomes:
        for name, weight in wanted[0].weights.items():
            assert np.array_equal(outcome.weights[name], weight), name


def run_alone(training: Training, directory: Path) -> Outcome:
    """The same training in this process, in a world of one."""
    return run_training(ALONE, training, directory)


def _replace_next_pass(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the loss of this process's next pass."""
    plain = Engine.forward_backward

    def changed(self: Engine, *arguments: Any) -> torch.Tensor:
        Engine.forward_backward = plain  # type: ignore[method-assign]
        return change(plain(self, *arguments))

    Engine.forward_backward = changed  # type: ignore[method-assign]


def _run_out_of_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And so on.")


def outputs_of(
    engine: Engine, tokens: Path, config: TrunkCacheConfig, ranks: Ranks, from_files: bool = False
) -> TrunkOutputs:
    """Outputs of a training data set's trunk, none of them computed yet."""
    trunk._READ_BYTES = 1e30 if from_files else 1e9
    dataset = CodeAlpacaDataset(tokens, "train")
    order = np.random.default_rng(0).permutation(len(dataset))
    return TrunkOutputs(engine, dataset, order, 200, 3, config, ranks=ranks)


def fill(
    ranks: Ranks, training: Training, config: TrunkCacheConfig, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[str, int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Fill the outputs of the first rows together: place, tokens computed here, rows that are ready, outputs."""
    outputs = outputs_of(
        Engine(build(training, ranks.device), dtype), training.tokens, config, ranks, training.from_files
    )
    fill_together(outputs, np.arange(rows))
    assert outputs.values is not None
    return outputs.place, outputs.computed, outputs.ready, outputs.values.cpu().float().numpy()


def scores(
    ranks: Ranks, training: Training, max_tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Losses and tokens of the validation rows."""
    dataset = CodeAlpacaDataset(training.tokens, "validation")
    return row_losses(Engine(build(training, ranks.device), dtype), dataset, max_tokens, ranks=ranks)


def addends(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different sizes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(rank)
    numbers = torch.randn(size, generator=generator, dtype=torch.float64)
    return (numbers * 10.0 ** torch.randint(-6, 6, (size,), generator=generator)).to(dtype)


def sums(ranks: Ranks, sizes: list[int], dtype: torch.dtype) -> list[np.ndarray[Any, Any]]:
    """Sums over the ranks of ``addends`` of these sizes."""
    tensors = [addends(ranks.rank, size, dtype).to(ranks.device) for size in sizes]
    ranks.sum_in_order(tensors)
    return [tensor.cpu().numpy() for tensor in tensors]


def agreements(ranks: Ranks) -> dict[str, Any]:
    """What the ranks say to small questions about their numbers."""
    own = torch.full((2,), float(ranks.rank), dtype=torch.bfloat16, device=ranks.device)
    return {
        "third": ranks.agree(ranks.rank == 2),
        "none": ranks.agree(False),
        "later": ranks.agree_later(ranks.rank == 0)(),
        "local": ranks.agree(ranks.rank == 0, local=True),
        "lowest": ranks.lowest(10 - ranks.rank),
        "lowest of host": ranks.lowest(10 - ranks.rank, local=True),
        "highest": ranks.highest(ranks.rank - 10),
        "gathered": ranks.gather(f"rank {ranks.rank}"),
        "first": ranks.from_first(lambda: ranks.rank),
        "first of host": ranks.from_first(lambda: ranks.rank, local=True),
        "host": ranks.gather_on_host(own).tolist(),
        "merged": ranks.merge(np.where(np.arange(4) == ranks.rank, 0.1 + ranks.rank, 0.0)).tolist(),
    }
