"""The host of a gang: starts ranks by torchrun, gives each its device, hears them, and ends them all together.

A gang has a fixed size. When one rank fails, dies or gives no sign of life, all of them are ended, and the caller may
start a new gang from the last checkpoint. Whatever happens to the host, no rank outlives it: torchrun dies with the
thread that started it, and each rank with torchrun.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.available import available_processors
from ops.machine.member import HOST_VARIABLE
from ops.machine.process import ProcessIdentity, identify_process

_POLL_SECONDS = 0.2
_SILENCE_SECONDS = 20.0  # without a sign of life, of which there is one every two seconds
_REACTION_SECONDS = 2.0  # after the first failure: its cause may be the failure of another rank, told a moment later
_STOP_SECONDS = 25.0  # in which the ranks end when they are told to: Prefect kills a cancelled flow after 30 s
_KILL_SECONDS = 10.0
_LAST_LINES = 3  # of a rank's output in the error's message
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Seat:
    """What one rank gets.

    Attributes:
        device: cpu or cuda:N.
        descriptor: of the device's lock, which the rank keeps open; None if it has none.
    """

    device: str
    descriptor: int | None


@dataclass(frozen=True)
class Node:
    """This machine's place among those of a gang.

    Attributes:
        count: number of machines.
        number: of this one, from 0.
        address, port: where the first machine's torchrun listens; unused with one machine.
    """

    count: int = 1
    number: int = 0
    address: str = ""
    port: int = 0


class GangError(RuntimeError):
    """A gang did not come to its end. All of its processes on this machine have ended.

    Attributes:
        kinds: names of the error's class and of its bases, in the rank that failed; empty if the rank died, was
            silent, or never began.
        facts: what the rank told about the error.
    """

    def __init__(self, message: str, kinds: Sequence[str] = (), facts: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.kinds, self.facts = tuple(kinds), dict(facts or {})


@dataclass
class _Rank:
    """A rank that has connected.

    Attributes:
        log: its output: torchrun's, until it has one of its own.
        heard: when it gave the last sign of life, in seconds of the monotonic clock.
        number: among all ranks; None until it has said it, as is ``identity``.
        text: the beginning of a message that has not arrived whole.
        is_over: whether it has ended, or failed.
    """

    connection: socket.socket
    log: Path
    heard: float
    number: int | None = None
    identity: ProcessIdentity | None = None
    text: bytes = b""
    is_over: bool = False

    @property
    def name(self) -> str:
        """For a sentence."""
        return "a rank" if self.identity is None else f"rank {self.number} (pid {self.identity.pid})"


@dataclass
class Gang:
    """One gang's part on this machine.

    Args:
        module: that each rank runs, by ``python -m``.
        arguments: its command line.
        seats: one for each rank on this machine.
        directory: of the ranks' output.
        known: names of errors that are causes, and never the consequence of another rank's failure.
        node: this machine's place among several.
    """

    module: str
    arguments: Sequence[str]
    seats: Sequence[Seat]
    directory: Path
    known: frozenset[str] = frozenset()
    node: Node = Node()
    _ranks: list[_Rank] = field(default_factory=list)
    _errors: list[GangError] = field(default_factory=list)
    _failed_at: float | None = None
    _stopped_at: float | None = None
    _ended_at: float | None = None

    def run(
        self, on_message: Callable[[str, dict[str, Any]], None], should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Start the ranks and wait for their end, which is that of all.

        Args:
            on_message: called with the kind and the content of each message that a rank sends.
            should_stop: asked five times a second; once it is true the ranks are asked to stop.

        Raises:
            GangError: a rank failed, died, or gave no sign of life; torchrun failed; or the ranks did not stop.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="gang-") as folder,  # only this user may enter it
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
            selectors.DefaultSelector() as selector,
            self._launcher_log.open("wb") as log,
        ):
            path = str(Path(folder) / "host")
            server.bind(path)
            server.listen()
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            torchrun = subprocess.Popen(
                self._command(),
                env=self._environment(path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the flow's process group does not reach it
            )
            try:
                self._supervise(torchrun, server, selector, on_message, should_stop)
            finally:
                self._end(torchrun)

    @property
    def _launcher_log(self) -> Path:
        return self.directory / f"torchrun-{self.node.number}.log"

    def _command(self) -> list[str]:
        node = self.node
        if node.count == 1:
            where = ["--standalone", "--local-addr", "127.0.0.1"]
        else:
            where = ["--node-rank", str(node.number), "--master-addr", node.address, "--master-port", str(node.port)]
        return [
            sys.executable, "-m", "ops.machine.torchrun", str(os.getpid()),
            "--nnodes", str(node.count), "--nproc-per-node", str(len(self.seats)), "--max-restarts", "0", *where,
            "-m", self.module, *self.arguments,
        ]  # fmt: skip

    def _environment(self, path: str) -> dict[str, str]:
        threads = max(1, available_processors() // len(self.seats))
        environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
        if self.node.count == 1 and sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not be resolved
        # PYTHONSAFEPATH: not a folder "tasks" of the working directory.
        return environment | {HOST_VARIABLE: path, "PYTHONSAFEPATH": "1"}

    def _supervise(
        self,
        torchrun: subprocess.Popen[bytes],
        server: socket.socket,
        selector: selectors.BaseSelector,
        on_message: Callable[[str, dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        while True:
            status = torchrun.poll()  # before messages are read: later there are none
            looked = time.monotonic()
            for key, _ in selector.select(_POLL_SECONDS):
                if key.fileobj is server:
                    rank = self._accept(server)
                    selector.register(rank.connection, selectors.EVENT_READ, rank)
                elif not self._read(key.data, on_message):
                    selector.unregister(key.fileobj)
            if self._stopped_at is None and should_stop():
                self._stopped_at = time.monotonic()
                for rank in self._ranks:
                    if rank.identity is not None:  # else it is asked once it has its seat
                        self._ask_to_stop(rank)
            self._look_for_failures(status, looked)
            if status is not None:
                self._ended_at = self._ended_at or time.monotonic()
                is_silent = len(selector.get_map()) == 1  # the server alone is left
                if is_silent or time.monotonic() - self._ended_at > _REACTION_SECONDS:
                    return self._check_end(status)

    def _accept(self, server: socket.socket) -> _Rank:
        """Let a rank connect."""
        connection, _ = server.accept()
        connection.settimeout(_SILENCE_SECONDS)
        rank = _Rank(connection, self._launcher_log, time.monotonic())
        self._ranks.append(rank)
        return rank

    def _welcome(self, rank: _Rank, said: Mapping[str, Any]) -> None:
        """Give a rank that has said its numbers its seat."""
        rank.number, rank.identity = said["rank"], identify_process(said["pid"])
        seat = self.seats[said["local_rank"]]
        log = self.directory / f"rank-{rank.number}.log"
        log.unlink(missing_ok=True)  # that of an earlier gang
        welcome = json.dumps({"device": seat.device, "log": str(log)}).encode() + b"\n"
        try:
            socket.send_fds(rank.connection, [welcome], [] if seat.descriptor is None else [seat.descriptor])
        except OSError:  # _read hears of its death; what it said is in torchrun's output
            return
        rank.log = log
        if self._stopped_at is not None:
            self._ask_to_stop(rank)

    @staticmethod
    def _ask_to_stop(rank: _Rank) -> None:
        with suppress(OSError):  # it has ended
            rank.connection.sendall(b"stop\n")

    def _read(self, rank: _Rank, on_message: Callable[[str, dict[str, Any]], None]) -> bool:
        """Read what a rank has said. Returns whether it may say more."""
        try:
            received = rank.connection.recv(65536)
        except OSError:  # it was killed
            received = b""
        rank.heard = time.monotonic()
        *lines, rank.text = (rank.text + received).split(b"\n")
        for line in lines:
            content = json.loads(line)
            kind = content.pop("kind")
            if kind == "hello":
                self._welcome(rank, content)
            elif kind == "end":
                rank.is_over = True
            elif kind == "error":
                text = f"rank {rank.number} failed: {content.pop('text')}"
                self._fail(rank, GangError(text, content.pop("kinds"), content))
            elif kind != "alive":
                on_message(kind, content)
        if not received and not rank.is_over:
            how = "died" if rank.identity else "died before it had said its number"
            self._fail(rank, GangError(f"{rank.name} {how}{_tail(rank.log)}"))
        return bool(received)

    def _fail(self, rank: _Rank, error: GangError) -> None:
        rank.is_over = True
        self._errors.append(error)
        self._failed_at = self._failed_at or time.monotonic()

    def _look_for_failures(self, status: int | None, looked: float) -> None:
        """Raise the failure that is the cause, some time after the first one.

        Args:
            status: of torchrun; None while it runs.
            looked: when this process last began to read what the ranks have said. It may have been slow since, or
                stopped, and that is not the ranks' silence.

        Raises:
            GangError: a rank has failed, died or been silent, or the ranks did not stop.
        """
        if status is not None and status < 0:  # the ranks died with it
            raise GangError(f"torchrun was killed by signal {-status}")
        now = time.monotonic()
        for rank in self._ranks:
            if not rank.is_over and looked - rank.heard > _SILENCE_SECONDS:
                how = f"has given no sign of life for {_SILENCE_SECONDS:.0f} s: it hangs, or was stopped"
                self._fail(rank, GangError(f"{rank.name} {how}{_tail(rank.log)}"))
        if self._failed_at and now - self._failed_at > _REACTION_SECONDS:
            raise self._cause()
        if status is None and self._stopped_at and now - self._stopped_at > _STOP_SECONDS:
            raise GangError(f"the ranks did not stop within {_STOP_SECONDS:.0f} s, and were ended")

    def _cause(self) -> GangError:
        """The failure that led to the others: a known error, then a death, then the error that was told first."""
        return min(self._errors, key=lambda error: (self.known.isdisjoint(error.kinds), bool(error.kinds)))

    def _check_end(self, status: int) -> None:
        """After torchrun has ended.

        Raises:
            GangError: not all ranks have come to their end.
        """
        if self._errors:
            raise self._cause()
        if status or len(self._ranks) < len(self.seats):
            raise GangError(f"torchrun ended with the status {status}{_tail(self._launcher_log)}")

    def _end(self, torchrun: subprocess.Popen[bytes]) -> None:
        """End what is left: with torchrun its ranks die, on Linux; those that have connected are killed too."""
        torchrun.kill()
        torchrun.wait()
        for rank in self._ranks:
            rank.connection.close()
        known = [rank.identity for rank in self._ranks if rank.identity is not None]
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline and (left := [each for each in known if each.is_alive]):
            for identity in left:
                with suppress(ProcessLookupError):
                    os.kill(identity.pid, 9)
            time.sleep(0.05)


def _tail(log: Path) -> str:
    """The last lines of an output, as the end of a sentence; empty if there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode(errors="backslashreplace").splitlines()
    except FileNotFoundError:
        lines = []
    last = [" ".join(line.split()) for line in lines if line.strip()][-_LAST_LINES:]
    return f"; the last lines of {log}: {' | '.join(last)}" if last else ""
