"""Processes: identified when dead, reused, rebooted or elsewhere; found by a variable; ended, and no others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ops.machine import process as module
from ops.machine.process import (
    Process,
    ProcessIdentity,
    end_processes,
    find_process,
    identify_process,
    left_behind,
    lock_holders,
    tagged,
)

VARIABLE = "FINETUNE_TEST_TAG"


def test_a_living_process_is_not_dead() -> None:
    """This process, before and after a round trip through JSON."""
    identity = identify_process()
    assert identity.is_alive
    assert not identity.is_dead
    assert ProcessIdentity.from_json(identity.to_json()) == identity


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_stored_form_does_not_change() -> None:
    """MLflow's tags and lock files of earlier versions hold these five fields, the start time in clock ticks."""
    stored = json.loads(identify_process().to_json())
    assert list(stored) == ["host", "machine", "boot", "pid", "started"]
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert stored["boot"] == f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    assert stored["pid"] == os.getpid()
    assert stored["started"] == Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    seconds = int(stored["started"]) / os.sysconf("SC_CLK_TCK") + psutil.boot_time()
    assert seconds == pytest.approx(psutil.Process().create_time(), abs=2)


def test_a_dead_process_is_dead() -> None:
    """As soon as it has ended, also before its parent has asked for its exit status."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify_process(process.pid)
    assert identity.started
    assert not identity.is_dead
    process.kill()
    process.wait()
    assert identity.is_dead


def test_a_zombie_is_dead() -> None:
    """Its parent has not waited for it, so its pid still exists, but it computes nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    identity = identify_process(process.pid)
    process.kill()
    assert process.stdout is not None
    process.stdout.read()
    deadline = time.monotonic() + 5
    while not identity.is_dead:
        assert time.monotonic() < deadline
    assert find_process(process.pid) is None
    process.wait()


def test_a_reused_pid_is_another_process() -> None:
    """The same pid with another start time: the process that was identified has ended."""
    assert replace(identify_process(), started="1").is_dead


def test_a_restart_of_the_machine_ends_all() -> None:
    """Pids and start times may repeat by chance after a restart; the boot id does not."""
    identity = identify_process()
    boot = "00000000-0000-0000-0000-000000000000 " + identity.boot.split(" ")[1]
    assert replace(identity, boot=boot).is_dead


def test_a_process_that_cannot_be_seen_is_neither_dead_nor_alive() -> None:
    """On another machine, one made from the same image too, or in another container on this kernel, it may live."""
    identity = identify_process()
    for other in (
        replace(identity, machine="another", started="1"),
        replace(identity, host="another", boot="00000000-0000-0000-0000-000000000000 pid:[1]"),  # a cloned machine-id
        replace(identity, boot=identity.boot.split(" ")[0] + " pid:[1]", started="1"),
    ):
        assert not other.is_dead
        assert not other.is_alive


def test_any_other_text_is_no_identity() -> None:
    """Any user can write tags and lock files."""
    known = json.loads(identify_process().to_json())
    other = [json.dumps({**known, "pid": pid}) for pid in ("1", 1.0, True, None, [1])]
    for text in ("", "null", "{}", '{"pid": 1}', "[1]", "not json", "[" * 100_000, *other):
        assert ProcessIdentity.from_json(text) is None


@pytest.fixture
def started(sleeper: Callable[..., subprocess.Popen[bytes]]) -> dict[str, subprocess.Popen[bytes]]:
    """A tagged process, a tagged flow run that ignores SIGTERM, and a process with another tag."""
    return {
        "tagged": sleeper(**{VARIABLE: "here"}),
        "run": sleeper(deaf=True, **{VARIABLE: "here", "PREFECT__FLOW_RUN_ID": "1234"}),
        "other": sleeper(**{VARIABLE: "elsewhere"}),
    }


def test_processes_are_found_by_a_variable(started: dict[str, subprocess.Popen[bytes]]) -> None:
    """By its name and value, each with its parent, its flow run and its command."""
    found = {process.pid: process for process in tagged(VARIABLE, "here")}
    assert set(found) == {started["tagged"].pid, started["run"].pid}
    process = found[started["tagged"].pid]
    assert process.identity == identify_process(started["tagged"].pid)
    assert process.parent == os.getpid()
    assert process.flow_run is None
    code = started["tagged"].args[2]  # type: ignore[index]
    assert process.command_line == f"{sys.executable} -c {code}"[:80]
    assert str(process) == f"pid {process.pid} ({Path(sys.executable).name} -c {code})"
    assert found[started["run"].pid].flow_run == "1234"
    assert find_process(started["run"].pid) == found[started["run"].pid]


def test_processes_of_a_dead_process_are_left_behind(sleeper: Callable[..., subprocess.Popen[bytes]]) -> None:
    """The variable holds the identity of the process that started them; any other text does not count."""
    sleeper(**{VARIABLE: "no identity"})
    sleeper(**{VARIABLE: identify_process().to_json()})
    orphan = sleeper(**{VARIABLE: replace(identify_process(), started="1").to_json()})
    assert [process.pid for process in left_behind(VARIABLE)] == [orphan.pid]


def test_processes_are_asked_and_then_killed(started: dict[str, subprocess.Popen[bytes]]) -> None:
    """SIGTERM first, SIGKILL for a process that ignores it; each that was signalled is returned."""
    ended = end_processes(lambda: tagged(VARIABLE, "here"), 0.5)
    assert {process.pid for process in ended} == {started["tagged"].pid, started["run"].pid}
    assert started["tagged"].wait(5) == -signal.SIGTERM
    assert started["run"].wait(5) == -signal.SIGKILL
    assert started["other"].poll() is None


def test_a_hurry_does_not_wait_for_sigterm(started: dict[str, subprocess.Popen[bytes]]) -> None:
    began = time.monotonic()
    end_processes(lambda: tagged(VARIABLE, "here"), 60, hurry=lambda: True)
    assert time.monotonic() - began < 10
    assert started["tagged"].wait(5) == -signal.SIGKILL


def test_a_reused_pid_is_not_signalled(started: dict[str, subprocess.Popen[bytes]]) -> None:
    """The process that was found has ended since, and its pid belongs to another."""
    pid = started["other"].pid
    stale = [[Process(replace(identify_process(pid), started="1"), 1, (), None)], []]
    assert end_processes(lambda: stale.pop(0), 0) == []
    with pytest.raises(subprocess.TimeoutExpired):
        started["other"].wait(0.3)


def test_the_same_inode_of_another_device_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up /proc, in which two processes hold locks of one inode number, one of them of this file."""
    path, other = tmp_path / "cpu.lock", tmp_path / "elsewhere"
    path.touch()
    other.touch()
    for pid, file in ((101, path), (102, other)):
        for folder in ("fdinfo", "fd"):
            (tmp_path / str(pid) / folder).mkdir(parents=True)
        lock = f"pos:\t0\nlock:\t1: FLOCK  ADVISORY  WRITE {pid} 00:{pid}:{path.stat().st_ino} 0 EOF\n"
        (tmp_path / str(pid) / "fdinfo" / "3").write_text(lock)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(file)
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert lock_holders(path) == [101]
