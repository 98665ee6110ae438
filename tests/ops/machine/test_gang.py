"""Gangs of two real processes under torchrun: they end together, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from made_up import ROOT, wait_for

from ops.machine import gang as module
from ops.machine.gang import Gang, GangError, Seat
from ops.machine.lock import exclusive
from ops.machine.lock_file import read_locks

Run = Callable[..., list[tuple[str, dict[str, Any]]]]
# Starts a gang that waits, and prints the pids of its processes.
HOST = """
import json, os, sys
from pathlib import Path
from ops.machine.gang import Gang, Seat
from ops.machine.lock import exclusive
pids = []
def hear(kind, content):
    pids.append(content["pid"])
    if len(pids) == 2:
        print(json.dumps([content["parent"], *pids]), flush=True)
with exclusive(Path(sys.argv[1]) / "locks", "cpu", "the host", print) as held:
    Gang("gang_ranks", ["wait"], [Seat("cpu", held.descriptor)] * 2, Path(sys.argv[1])).run(hear)
"""


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'helpers'}")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """run(what): what two ranks have said; afterwards none of them lives."""

    def start(what: str, should_stop: Callable[[], bool] = lambda: False, known: frozenset[str] = frozenset()) -> Any:
        said: list[tuple[str, dict[str, Any]]] = []
        seats = [Seat("the first", None), Seat("the second", None)]
        try:
            Gang("gang_ranks", [what], seats, tmp_path, known).run(
                lambda kind, content: said.append((kind, content)), should_stop
            )
        finally:
            pids = [content["pid"] for kind, content in said if kind == "here"]
            assert len(pids) == 2
            assert [pid for pid in pids if _lives(pid)] == []
        return said

    return start


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_get_their_seats_and_end(run: Run, tmp_path: Path) -> None:
    """Each has the device of its seat, and its output is in a file of its own."""
    said = run("end")
    assert sorted(content["device"] for _, content in said) == ["the first", "the second"]
    for rank in range(2):
        log = tmp_path / f"rank-{rank}.log"
        assert log.exists()


def test_no_message_is_lost(run: Run) -> None:
    """Not of many, and not those behind which the rank ends at once."""
    said = [content["value"] for kind, content in run("say much") if kind == "number"]
    assert sorted(said) == sorted([*range(20_000)] * 2)


def test_a_rank_that_dies_ends_all(run: Run, tmp_path: Path) -> None:
    """The error names the rank and the last lines of its output."""
    began = time.monotonic()
    with pytest.raises(GangError) as caught:
        run("die")
    assert time.monotonic() - began < 30
    assert str(caught.value).startswith("rank 1 (pid ")
    assert str(caught.value).endswith(f" died; the last lines of {tmp_path}/rank-1.log: one line | and another")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("die before its welcome", r"^rank 1 \(pid \d+\) died; the last lines of "),
        ("die in its hello", r"^a rank died before it had said its number; the last lines of .*torchrun-0.log"),
        ("say nothing", r"^a rank has given no sign of life for 5 s: it hangs, or was stopped"),
    ],
)
def test_a_rank_that_does_not_join_ends_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, message: str
) -> None:
    """Between its connection and the host's welcome; words of an earlier gang in its log are none of its own."""
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 5.0)
    (tmp_path / "rank-1.log").write_text("words of an earlier gang\n")
    pids: list[int] = []
    with pytest.raises(GangError, match=message) as caught:
        Gang("gang_ranks", [what], [Seat("cpu", None)] * 2, tmp_path).run(
            lambda kind, content: pids.append(content["pid"])
        )
    assert "an earlier gang" not in str(caught.value)
    assert not any(_lives(pid) for pid in pids)


def test_a_rank_that_hangs_ends_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: after a bounded wait, of which the limit is shorter here."""
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 6.0)
    with pytest.raises(GangError, match=r"^rank 1 \(pid \d+\) has given no sign of life for 6 s"):
        run("hang")


@pytest.mark.slow
def test_a_host_that_is_slow_takes_no_rank_for_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the ranks have said meanwhile is read before their silence is measured; the limit is shorter here."""
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 4.0)
    heard: list[str] = []

    def hear(kind: str, content: dict[str, Any]) -> None:
        heard.append(kind)
        if len(heard) == 2:
            time.sleep(6)

    Gang("gang_ranks", ["stop"], [Seat("cpu", None)] * 2, tmp_path).run(hear, lambda: len(heard) == 2)
    assert heard == ["here", "here", "stopped", "stopped"]


@pytest.mark.parametrize("known", ["LookupError", "none"])
def test_the_cause_is_named_and_not_its_consequence(run: Run, known: str) -> None:
    """An error that is known as a cause goes before one that was told earlier; else the earlier one is named."""
    with pytest.raises(GangError) as caught:
        run("fail", known=frozenset({known}))
    cause = "rank 1 failed: the first one" if known == "LookupError" else "rank 0 failed: the consequence"
    assert str(caught.value) == cause
    assert ("LookupError" in caught.value.kinds) == (known == "LookupError")


def test_ranks_stop_when_they_are_asked(run: Run) -> None:
    """They end by themselves, and the gang has come to its end."""
    began = time.monotonic()
    said = run("stop", should_stop=lambda: time.monotonic() > began + 1)
    assert [kind for kind, _ in said].count("stopped") == 2


def test_ranks_that_do_not_stop_are_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded wait, shorter here."""
    monkeypatch.setattr(module, "_STOP_SECONDS", 8.0)
    began = time.monotonic()
    with pytest.raises(GangError, match=r"^the ranks did not stop within 8 s, and were ended$"):
        run("wait", should_stop=lambda: time.monotonic() > began + 1)


def test_a_module_that_cannot_start_is_named_with_torchrun_s_words(tmp_path: Path) -> None:
    """torchrun's own output is in the message: here no rank has begun."""
    with pytest.raises(GangError, match=r"^torchrun ended with the status 1; the last lines of .*torchrun-0.log"):
        Gang("no_such_module", [], [Seat("cpu", None)] * 2, tmp_path).run(lambda kind, content: None)


@pytest.mark.parametrize("victim", ["the host", "torchrun"])
def test_no_rank_outlives_host_and_torchrun(tmp_path: Path, victim: str) -> None:
    """kill -9 of either ends all in a second; until then the ranks keep the device, and then nobody does."""
    process = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        torchrun, *ranks = json.loads(process.stdout.readline())
        (lock,) = read_locks(tmp_path / "locks")
        assert {process.pid, *ranks} <= {*lock.pids}
        for rank in ranks:  # signals that reach every process of a flow run, as those of `make down` do
            os.kill(rank, signal.SIGTERM)
        os.kill(torchrun, signal.SIGTERM)
        time.sleep(0.5)
        assert all(_lives(pid) for pid in [torchrun, *ranks])
        os.kill(process.pid if victim == "the host" else torchrun, signal.SIGKILL)
        wait_for("the end of all", lambda: not any(_lives(pid) for pid in [torchrun, *ranks]), 5)
        process.wait(15)
        with exclusive(tmp_path / "locks", "cpu", "the next", lambda line: pytest.fail(line)):
            pass
    finally:
        process.kill()
        process.wait()
