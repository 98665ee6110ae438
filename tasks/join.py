"""``python -m tasks.join HOST:PORT NUMBER``: take part in the trainings of a flow run on another machine.

HOST:PORT is FINETUNE_RENDEZVOUS of that machine, and NUMBER this machine's own, from 1. It ends with the flow run.
The data root, which has rows, weights and checkpoints, must be the same folder on all machines.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model.engine.training import PassesTooLongError
from ops.machine.gang import Node
from ops.machine.stopping import ASKING
from ops.text import one_line
from tasks.gang import held_devices, run_job
from tasks.nodes import Announcement, find_store, is_over, read_newest, split_address

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_POLL_SECONDS = 1.0
_log = logging.getLogger("join")


def main(arguments: list[str]) -> int:
    """Do this machine's part of each job that is announced. Returns the exit status."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    try:
        text, number = arguments
        address, port = split_address(text)
        place = int(number)
    except ValueError as error:
        print(f"python -m tasks.join HOST:PORT NUMBER, not {' '.join(arguments)} ({error})", file=sys.stderr)
        return 2
    for each in ASKING:
        signal.signal(each, signal.SIG_DFL)  # Python runs no handler of its own while torch looks for the store
    _log.info("machine %d waits for a flow run at %s", place, text)
    try:
        store = find_store(address, port)
    except RuntimeError as error:
        print(f"no flow run was found at {text}, which FINETUNE_RENDEZVOUS names: {one_line(error)}", file=sys.stderr)
        return 1
    stopping = threading.Event()
    for each in ASKING:
        signal.signal(each, lambda signum, frame: stopping.set())
    _log.info("machine %d has found the flow run at %s", place, text)
    done, fitting = 0, None
    while not stopping.wait(_POLL_SECONDS):
        try:
            newest = read_newest(store)
        except RuntimeError:
            _log.info("the flow run has ended")
            return 0
        if newest is None or newest[0] == done:
            continue
        done, announcement = newest
        node = Node(announcement.count, place, address, port + 1)
        try:
            must_end = partial(_must_end, stopping, store, done)
            _take_part(_with_passes(announcement, fitting), node, must_end)
        except PassesTooLongError as error:
            _log.error("%s", error)
            fitting = error.micro_batch_tokens  # all ranks take the shortest passes that one of them has
        except (ArithmeticError, RuntimeError, ValueError, OSError) as error:
            _log.error("%s", error)  # the flow's own gang fails too, and announces the job again or ends
    return 0


def _must_end(stopping: threading.Event, store: TCPStore, number: int) -> bool:
    """Whether this machine's part of a job is to end: it was asked to, or the first machine's has ended."""
    return stopping.is_set() or is_over(store, number)


def _with_passes(announcement: Announcement, tokens: int | None) -> Announcement:
    """The same job in passes that this machine's memory has been found to hold; None if it has held all so far."""
    if tokens is None:
        return announcement
    fewer = min(tokens, announcement.job.micro_batch_tokens or tokens)
    return replace(announcement, job=replace(announcement.job, micro_batch_tokens=fewer))


def _take_part(announcement: Announcement, node: Node, should_stop: Callable[[], bool]) -> None:
    """Do this machine's part of a job.

    Raises:
        FileNotFoundError: this machine does not have the first one's files.
        ValueError: this machine has fewer devices, or a number that it cannot have.
        GangError: and others, as run_job.
    """
    job, training = announcement.job, announcement.job.training
    if not 0 < node.number < node.count:
        raise ValueError(
            f"machine {node.number} is not between 1 and {node.count - 1}: the first one has the number 0"
        )
    for path in (training.tokens.directory, training.model.directory):
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} is not on this machine: the data root must be the same on all machines")
    kind = training.determinants["device"]
    with held_devices(kind, announcement.processes, f"machine {node.number} of a training", _log.info) as devices:
        _log.info("trains on %s", ", ".join(devices.names))
        run_job(devices, job, lambda kind, content: None, should_stop, node)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
