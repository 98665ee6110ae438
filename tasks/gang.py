"""Work on several devices: the ranks do it, and this process has the run's log, metrics and signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from model.engine.trainer import NonFiniteError, StepReport, TrainingStoppedError, TrainResult
from model.engine.training import PassesTooLongError
from model.net.device import count_processes, device_choices, device_key, resolve_device
from ops.machine.gang import Gang, GangError, Node, Seat
from ops.machine.lock import TURN, exclusive_several
from ops.machine.lock_file import shared_directory
from ops.settings import Settings
from tasks.frozen import trunk_cache
from tasks.gang_job import GangJob, write_job
from tasks.nodes import Nodes, announced
from tasks.scoring import BothOutputs, Scoring, read_outputs, score_models

# Per process. A gang starts in the time in which one process completes some thousand prompts; with fewer there is
# nothing to gain. Not measured on several GPUs yet.
_FEWEST_COMPLETIONS = 2_000
WORKER = "tasks.rank_worker"  # the module that each rank runs
# Errors of a training that would come again. Of a rank they mean the same when the task raises them, if no bugs.
RAISED = (NonFiniteError, ValueError, FileNotFoundError, torch.OutOfMemoryError)
_KNOWN = frozenset(kind.__name__ for kind in (*RAISED, PassesTooLongError))


@dataclass(frozen=True)
class Devices:
    """The devices that a run computes on, and that it holds until it ends.

    Attributes:
        names: cpu or cuda:N, one for each process of a training; a CPU stands once for each process.
        descriptors: of their lock files, which these processes keep open; a CPU that stands again has the same one.
    """

    names: tuple[str, ...]
    descriptors: tuple[int, ...]

    @property
    def first(self) -> str:
        """The device of work that one process does."""
        return self.names[0]

    @property
    def need_gang(self) -> bool:
        """Whether processes of their own train: on several devices, or on several machines."""
        return len(self.names) > 1 or Nodes.load().count > 1

    @property
    def seats(self) -> list[Seat]:
        """The ranks' places."""
        return [Seat(*each) for each in zip(self.names, self.descriptors, strict=True)]


@contextmanager
def held_devices(
    device: str,
    gpus: int | str,
    holder: str,
    log: Callable[[str], None],
    show: Callable[[str | None], None] = lambda message: None,
    flow_run_id: str = "",
) -> Iterator[Devices]:
    """Hold devices of this machine, all of them together or none; any GPUs for ``auto`` and ``cuda``.

    A CPU is held once, and stands for each of its processes. The other arguments are those of
    ``ops.machine.lock.exclusive_several``.

    Args:
        device: auto, cpu, cuda or cuda:N.
        gpus: a number, or "all".

    Raises:
        ValueError: as model.net.device.count_processes.
    """
    places = {device_key(place): place for place in device_choices(device)}
    processes = count_processes(device, gpus)
    count = min(processes, len(places))
    directory = shared_directory(Settings.load().device_locks)
    turn = "" if list(places) == ["cpu"] else TURN
    with exclusive_several(directory, list(places), count, holder, log, show, flow_run_id, turn) as held:
        seats = [held[number % count] for number in range(processes)]
        yield Devices(tuple(str(places[each.what]) for each in seats), tuple(each.descriptor for each in seats))


def train_on(
    devices: Devices,
    job: GangJob,
    log: Any,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> TrainResult:
    """Train on several devices of this machine; where memory does not hold a pass, again with passes half as long.

    Raises:
        TrainingStoppedError: should_stop returned true; a checkpoint of the last step was saved.
        NonFiniteError, ValueError, torch.OutOfMemoryError: as ``model.engine.training.train``.
        GangError: a rank died, hung, or failed otherwise; the training can be resumed.
    """
    results: list[TrainResult] = []
    stopped: list[str] = []

    def hear(kind: str, content: dict[str, Any]) -> None:
        if kind == "step":
            on_step(StepReport(**content))
        elif kind == "warning":
            log.warning(content["text"])
        elif kind == "stopped":
            stopped.append(content["text"])
        elif kind == "result":
            results.append(TypeAdapter(TrainResult).validate_python(content["value"]))

    while True:
        try:
            with announced(job, len(devices.names)) as node:
                run_job(devices, job, hear, should_stop, node)
            break
        except PassesTooLongError as error:
            log.warning("%s: all ranks begin again from the last checkpoint, and steps stay the same", error)
            job = replace(job, micro_batch_tokens=error.micro_batch_tokens)
    if stopped:
        raise TrainingStoppedError(stopped[0])
    if not results:
        raise GangError("all ranks have ended, and the first one has given no result")
    return results[0]


def score(scoring: Scoring, devices: Devices, trunk_cache_gb: float, log: Any) -> BothOutputs:
    """Score base and tuned model: on all devices if it pays, else on the first one.

    Raises:
        GangError: a rank died, hung, or failed otherwise.
    """
    few = scoring.completions() < _FEWEST_COMPLETIONS * len(devices.names)
    if len(devices.names) == 1 or few:
        return score_models(scoring, resolve_device(devices.first), trunk_cache(trunk_cache_gb))
    log.info("%d processes share the test rows", len(devices.names))
    paths: list[Path] = []

    def hear(kind: str, content: dict[str, Any]) -> None:
        if kind == "outputs":
            paths.append(Path(content["path"]))

    run_job(devices, GangJob(scoring.training, trunk_cache_gb, scoring=scoring), hear, lambda: False)
    return read_outputs(paths[0])


def run_job(
    devices: Devices,
    job: GangJob,
    hear: Callable[[str, dict[str, Any]], None],
    should_stop: Callable[[], bool],
    node: Node = Node(),  # noqa: B008
) -> None:
    """Run this machine's part of a gang, and raise its error as if it had been raised here.

    Raises:
        PassesTooLongError, NonFiniteError, ValueError, torch.OutOfMemoryError: a rank did, and it is a mistake
            (ops/mistakes.py).
        GangError: a rank died, hung, or failed otherwise, as by a bug.
    """
    directory = Path(job.training.directory)
    path = directory / f"gang-{node.number}.json"
    write_job(path, job)
    gang = Gang(WORKER, [str(path)], devices.seats, directory, _KNOWN, node)
    try:
        gang.run(hear, should_stop)
    except GangError as error:
        if PassesTooLongError.__name__ in error.kinds:
            raise PassesTooLongError(str(error), error.facts["micro_batch_tokens"]) from error
        for kind in RAISED:
            is_told = error.facts.get("is_mistake") or kind is torch.OutOfMemoryError
            if kind.__name__ in error.kinds and is_told:
                raise kind(str(error)) from error
        if error.kinds:  # a bug, or the end of another machine's ranks
            message = f"{error} ({error.kinds[0]}; the ranks' logs in {directory} have its traceback)"
            raise GangError(message, error.kinds, error.facts) from error
        raise
