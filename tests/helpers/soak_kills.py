"""The kills of a soak: what is hit, with which signal, and at which moment; all of it drawn from one seed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from made_up import MadeUp

from ops.machine.process import Process, identify_process

# How often each victim is drawn. "flow" is the process of the flow, which is also the trainer.
VICTIMS = {"flow": 18, "prefect": 8, "mlflow": 8, "worker": 6, "watch": 4, "flow and worker": 3, "make up": 3}
_ENDS_THE_FLOW = ("flow", "flow and worker", "make up")
# Moments by what is waited for, with the longest further pause in seconds. Those behind "flow begins" are marks that
# the flow leaves on disk; they are aimed at because the windows behind them are short.
MOMENTS = {"any time": 5.0, "flow begins": 6.0, "evaluated": 1.0, "exported": 0.8, "registered": 0.6, "aliased": 0.2}
_OF_A_FLOW, _OF_OTHERS = (10, 2, 2, 3, 3, 3), (16, 2, 1, 1, 1, 0)  # their weights, by the victim
# Programs of `make up` by a word of their command.
_WORDS = {
    "prefect": "ops.stack.host_check",
    "mlflow": "mlflow --env-file",
    "worker": "prefect worker start",
    "watch": "ops.recovery.watch",
}
_PATIENCE = 60.0  # seconds until a kill whose moment does not come is done all the same


@dataclass(frozen=True)
class Kill:
    """One kill: after ``moment`` and ``pause`` seconds the victim gets ``signal``.

    Attributes:
        stopped: seconds until SIGCONT, for SIGSTOP.
    """

    moment: str
    pause: float
    victim: str
    signal: signal.Signals
    stopped: float = 0.0

    @property
    def ends_the_flow(self) -> bool:
        """Whether the run that it hits must be started again."""
        return self.victim in _ENDS_THE_FLOW and self.signal != signal.SIGSTOP


@dataclass(frozen=True)
class Hit:
    """A kill that was done: when (seconds since the soak began), at what, and what the flow was doing."""

    kill: Kill
    at: float
    phase: str
    pids: list[int]


def draw(rng: random.Random, kills: int, extras: int, stages: int) -> list[list[Kill]]:
    """``kills`` times SIGKILL and ``extras`` other signals, spread evenly over the stages.

    A stage's kills of servers, worker and watcher are spread over its attempts; each attempt but the last ends with a
    kill of the flow.
    """
    drawn = [_draw_one(rng, signal.SIGKILL) for _ in range(kills)]
    drawn += [_draw_one(rng, rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])) for _ in range(extras)]
    rng.shuffle(drawn)
    shares = [drawn[number::stages] for number in range(stages)]
    # The first stage, the training, gives no alias.
    shares[0] = [replace(kill, moment="registered") if kill.moment == "aliased" else kill for kill in shares[0]]
    return [_in_attempts(rng, share) for share in shares]


def _draw_one(rng: random.Random, number: signal.Signals) -> Kill:
    victims = VICTIMS if number == signal.SIGKILL else {"flow": 3, "prefect": 1, "mlflow": 1, "watch": 1}
    victim = rng.choices(list(victims), list(victims.values()))[0]
    moment = rng.choices(list(MOMENTS), _OF_A_FLOW if victim in _ENDS_THE_FLOW else _OF_OTHERS)[0]
    return Kill(moment, rng.uniform(0.0, MOMENTS[moment]), victim, number, rng.uniform(1.0, 8.0))


def _in_attempts(rng: random.Random, drawn: Sequence[Kill]) -> list[Kill]:
    """The same kills in another order: each kill of a flow ends a group, those behind a promotion end the stage."""
    last = [kill for kill in drawn if kill.ends_the_flow]
    last.sort(key=lambda kill: kill.moment == "aliased")
    groups: list[list[Kill]] = [[] for _ in last] or [[]]
    for kill in drawn:
        if kill not in last:
            rng.choice(groups).append(kill)
    for group, kill in zip(groups, last, strict=False):
        group.append(kill)
    return [kill for group in groups for kill in group]


@dataclass
class Saboteur:
    """Does the kills, one after the other, in a thread. Those that a stage was too short for are left to the next.

    Attributes:
        made: the installation.
        kills: those that are still to be done; each stage adds its own.
        hits: those that were done.
        registered: the versions of the registry when the last attempt was killed.
    """

    made: MadeUp
    say: Callable[[str], None]
    kills: list[Kill] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    registered: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    def work(self) -> None:
        """Until ``ended`` is set."""
        while not self.ended.is_set():
            if not self.kills:
                time.sleep(0.05)
                continue
            kill = self.kills[0]
            if self._wait_for(kill) and (pids := self._strike(kill)):
                self.kills.pop(0)
                self.hits.append(Hit(kill, time.monotonic() - self.began, self._phase, pids))
                self.say(f"{len(self.hits):3} {kill.signal.name} {kill.victim} {pids}: {self._phase} ({kill.moment})")

    def _wait_for(self, kill: Kill) -> bool:
        """Wait for the moment of a kill, and note the phase. False if the soak has ended meanwhile."""
        since, deadline = time.time(), time.monotonic() + _PATIENCE
        marks = Marks(self.made)
        moment = None
        while not self._is_closing(kill, marks) and time.monotonic() < (moment or deadline):
            if moment is None and marks.reached(kill.moment, since):
                moment = time.monotonic() + kill.pause
            if self.ended.wait(0.1 if kill.moment == "flow begins" else 0.01):
                return False
        self._phase = marks.phase()
        return not self.ended.is_set()

    def _is_closing(self, kill: Kill, marks: Marks) -> bool:
        """Whether the attempt has registered its model, and would end before the kills of its stage are done.

        Then waiting is over, up to the next kill of the flow, so that the stage has another attempt.
        """
        found = marks.versions()
        self.registered = self.registered or found
        if kill.ends_the_flow and kill.moment in ("registered", "aliased"):  # it comes in time by itself
            return False
        wanted = any(other.ends_the_flow and other.moment != "aliased" for other in self.kills)
        return wanted and found is not None and found != self.registered

    def _strike(self, kill: Kill) -> list[int]:
        """Send the signal. Returns the pids that got it; none if the victim does not live now."""
        struck = []
        for victim in kill.victim.split(" and "):
            for pid in victims(self.made, victim):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, kill.signal)
                    struck.append(pid)
        if struck and kill.ends_the_flow:
            self.registered = Marks(self.made).versions()
        if not struck:
            time.sleep(0.1)
        elif kill.signal == signal.SIGSTOP:
            self.ended.wait(kill.stopped)
            for pid in struck:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return struck


def victims(made: MadeUp, name: str) -> list[int]:
    """The pids of a program: of a server its child too, of a flow run the first one."""
    if name == "make up":
        lock = made.home / "up.lock"
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(json.loads(lock.read_text())["pid"])
            return [pid] if identify_process(pid).started else []
        return []
    found = made.processes()
    if name == "flow":
        return [process.pid for process in flows(found)]
    programs = [p for p in found if p.flow_run is None]
    chosen = [process.pid for process in programs if _WORDS[name] in process.command]
    return chosen + [process.pid for process in programs if process.parent in chosen]


def flows(processes: Sequence[Process]) -> list[Process]:
    """The first process of each flow run."""
    inside = {process.pid for process in processes if process.flow_run}
    return [process for process in processes if process.flow_run and process.parent not in inside]


class Marks:
    """What the flow has left on disk, read without any server.

    The registry is read when this is made, so that only later changes count.
    """

    def __init__(self, made: MadeUp):
        self.made = made
        self.trainings = made.home.parent / "trainings"
        self.registry = self._registry()

    def reached(self, moment: str, since: float) -> bool:
        """Whether a moment has come after a time of day."""
        if moment == "any time":
            return True
        if moment == "flow begins":
            return any(_age(process) < 1.0 for process in flows(self.made.processes()))
        if moment == "evaluated":
            return self._newest("*/pass_rate.json") > since
        if moment == "exported":
            return self._newest("*/model/*") > since
        found = self._registry()
        if not (found and self.registry):  # the database is locked, or does not exist yet
            self.registry = self.registry or found
            return False
        number = ("registered", "aliased").index(moment)
        return found[number] != self.registry[number]

    def versions(self) -> str | None:
        """The number of versions, and who took them over; None if the database cannot be read."""
        found = self._registry()
        return found[0] if found else None

    def phase(self) -> str:
        """What the flow is doing now: the last mark that it has left since its process began."""
        running = flows(self.made.processes())
        if not running:
            return "no flow"
        began = time.time() - max(_age(process) for process in running)
        found = self._registry()
        if found and found[2] > began:
            return "promote, close"
        if self._newest("*/pass_rate.json") > began:
            return "publish"
        touched = [path for path in self.trainings.glob("*/training.json") if path.stat().st_mtime > began]
        if not touched:
            return "begin, prepare"
        return "evaluate" if any(_is_trained(path) for path in touched) else "train"

    def _newest(self, pattern: str) -> float:
        """The time of day at which the newest such file of a training was written; 0 if there is none."""
        newest = 0.0
        for path in self.trainings.glob(pattern):
            with contextlib.suppress(OSError):
                newest = max(newest, path.stat().st_mtime)
        return newest

    def _registry(self) -> tuple[str, str, float] | None:
        """Versions with who took them over, aliases, time of the last version; None if it cannot be read."""
        query = (
            "SELECT (SELECT count(*) FROM model_versions)"
            " || (SELECT ifnull(group_concat(value), '') FROM model_version_tags WHERE key = 'taken_over_by'), "
            "(SELECT group_concat(alias || ' ' || version) FROM registered_model_aliases), "
            "(SELECT max(creation_time) FROM model_versions)"
        )
        try:
            address = f"file:{self.made.home / 'mlflow.db'}?mode=ro"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0.2)) as connection:
                versions, aliases, newest = connection.execute(query).fetchone()
        except sqlite3.Error:
            return None
        return versions, aliases or "", (newest or 0) / 1000


def _is_trained(facts: Path) -> bool:
    """Whether a training, given by its training.json, has the checkpoint of its last step."""
    steps = json.loads(facts.read_text())["config"]["max_steps"]
    return (facts.parent / f"step-{steps:08d}").is_dir()


def _age(process: Process) -> float:
    """Seconds since a process began."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - int(process.identity.started) / os.sysconf("SC_CLK_TCK")
