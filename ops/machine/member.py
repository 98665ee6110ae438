"""A rank's side of a gang: its device, its messages to the host, and the host's request to stop.

A rank that torchrun was told to start by hand, as under Slurm, has no host: it prints its messages, and SIGTERM asks
it to stop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ops.machine.process import die_with_parent
from ops.machine.stopping import ASKING

HOST_VARIABLE = "FINETUNE_GANG_HOST"  # path of the host's socket, in the environment of all ranks
ALIVE_SECONDS = 2.0  # between two signs of life
_MOST_BYTES = 65536  # of the host's welcome
_ORPHAN_SECONDS = 10.0  # in which a rank ends by itself when its host has gone


@dataclass
class Member:
    """A rank of a gang.

    Attributes:
        rank: among all ranks of all machines.
        local_rank: among those of this machine.
        device: that the host gives it; empty without a host.
        stopping: set when the rank is to stop at the next step that all ranks agree on.
        connection: to the host; None without one.
    """

    rank: int
    local_rank: int
    device: str = ""
    stopping: threading.Event = field(default_factory=threading.Event)
    connection: socket.socket | None = None
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, kind: str, **content: Any) -> None:
        """Tell the host something: a kind, and what can be written as JSON. Floats may be infinite or NaN."""
        line = json.dumps({"kind": kind, **content})
        if self.connection is None:
            if kind != "alive":
                print(f"rank {self.rank}: {line}", flush=True)
            return
        with self._sending:
            self.connection.sendall(line.encode() + b"\n")


def take_place() -> Member:
    """Join the gang that torchrun's environment describes. From then on the process dies with torchrun.

    Output goes to the file that the host names. The descriptor of the device's lock, which the host sends, stays open
    as long as the process lives.

    Raises:
        SystemExit: the host has gone.
    """
    die_with_parent()
    member = Member(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
    path = os.environ.get(HOST_VARIABLE)
    if path is None:
        for number in ASKING:
            signal.signal(number, lambda number, frame: member.stopping.set())
        return member
    for number in ASKING:  # they may reach every process of a flow run; the host decides
        signal.signal(number, signal.SIG_IGN)
    member.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        member.connection.connect(path)
        member.send("hello", rank=member.rank, local_rank=member.local_rank, pid=os.getpid())
        welcome, _, _, _ = socket.recv_fds(member.connection, _MOST_BYTES, 1)
    except OSError:
        welcome = b""
    if not welcome:
        raise SystemExit(f"rank {member.rank}: the process that started this gang has ended")
    line, _, rest = welcome.partition(b"\n")
    seat = json.loads(line)
    member.device = seat["device"]
    log = os.open(seat["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    for work in (lambda: _listen(member, rest), lambda: _show_life(member)):
        threading.Thread(target=work, name="gang", daemon=True).start()
    return member


def _listen(member: Member, text: bytes) -> None:
    """Wait for the request to stop, the only thing that the host says, and for the host's end."""
    assert member.connection is not None
    while True:
        if b"stop" in text:
            member.stopping.set()
        try:
            text = member.connection.recv(_MOST_BYTES)
        except OSError:
            text = b""
        if not text:
            member.stopping.set()
            time.sleep(_ORPHAN_SECONDS)
            os._exit(1)


def _show_life(member: Member) -> None:
    while True:
        time.sleep(ALIVE_SECONDS)
        try:
            member.send("alive")
        except OSError:  # _listen ends the process
            return
