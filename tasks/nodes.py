"""Several machines in one training: the first runs the flow and announces the job, each other one joins it.

Two variables tell the first machine so: FINETUNE_NODES, the number of machines, and FINETUNE_RENDEZVOUS, HOST:PORT of
the first one. The announcement is at that port, torchrun's own rendezvous at the next one.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from model.records import parse_record
from ops.machine.gang import Node
from tasks.gang_job import GangJob

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_COUNT = "jobs"  # key of the number of jobs so far
_CONNECT = timedelta(seconds=600)  # a flow prepares rows before it announces a job


@dataclass(frozen=True)
class Nodes:
    """The machines of a training.

    Attributes:
        count: their number.
        address, port: of the first one's announcements; unused with one machine.
    """

    count: int = 1
    address: str = ""
    port: int = 0

    @classmethod
    def load(cls) -> Nodes:
        """Read the environment.

        Raises:
            ValueError: a variable is wrong, or one of two is missing.
        """
        count, address = os.environ.get("FINETUNE_NODES", "1"), os.environ.get("FINETUNE_RENDEZVOUS", "")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"FINETUNE_NODES is {count!r}, and should be the number of machines")
        if int(count) == 1:
            return cls()
        return cls(int(count), *split_address(address))


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        ValueError: it is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError(
            f"FINETUNE_RENDEZVOUS is {text!r}, and should be HOST:PORT of the first machine, where this port and the "
            "next one are free"
        )
    return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Announcement:
    """What the first machine tells the others.

    Attributes:
        count: number of machines.
        processes: of each machine.
        job: what is to be done; its paths are those of the first machine.
    """

    count: int
    processes: int
    job: GangJob


@contextmanager
def announced(job: GangJob, processes: int) -> Iterator[Node]:
    """Tell the other machines of a job, if there are any, and in the end that it is over.

    Yields:
        This machine's place.

    Raises:
        ValueError: as Nodes.load.
    """
    nodes = Nodes.load()
    if nodes.count == 1:
        yield Node()
        return
    store = _open_store(nodes.port)
    number = store.add(_COUNT, 1)
    store.set(_key(number), json.dumps(asdict(Announcement(nodes.count, processes, job))))
    try:
        yield Node(nodes.count, 0, nodes.address, nodes.port + 1)
    finally:
        store.set(_key(number, "over"), "")
        store.check([_key(number, "over")])  # a set is not answered: now the store has it


@functools.cache
def _open_store(port: int) -> TCPStore:
    """The announcements of this process; they are there until it ends."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)


def find_store(address: str, port: int) -> TCPStore:
    """The announcements of the first machine, which may not be there yet.

    Raises:
        RuntimeError: they are not there after ten minutes.
    """
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(address, port, is_master=False, timeout=_CONNECT)


def read_newest(store: TCPStore) -> tuple[int, Announcement] | None:
    """The job that was announced last, with its number; None if there is none, or it is over.

    Raises:
        RuntimeError: the first machine's process has ended.
        ValueError: it is not an announcement of this version of the code.
    """
    number = store.add(_COUNT, 0)
    if not store.check([_key(number)]) or store.check([_key(number, "over")]):
        return None
    found = parse_record(store.get(_key(number)), Announcement, "the job that the first machine announces")
    return number, found


def is_over(store: TCPStore, number: int) -> bool:
    """Whether the first machine's part of a job has ended, or its process."""
    try:
        return bool(store.check([_key(number, "over")]))
    except RuntimeError:
        return True


def _key(number: int, kind: str = "job") -> str:
    return f"{kind}-{number}"
