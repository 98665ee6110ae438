"""Sandboxes that run side by side as one user: how many there are, and that no row reaches another's processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from small_disk import fill, small_disk

from ops.sandbox import guards as sandbox
from ops.sandbox.guards import RowResult, run_tests

FILTERED = os.uname().machine in ("x86_64", "aarch64") and sys.platform == "linux"
# A broken bubblewrap is not skipped: it fails these tests.
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

# What it takes to notice a process, to read its memory, to end it or to slow it down.
REACH = f"""
arm = {os.uname().machine != "x86_64"}
import ctypes, os, resource
system = ctypes.CDLL(None).syscall
attempts = {{
    "kill": lambda pid: os.kill(pid, 0),
    "killpg": lambda pid: os.killpg(pid, 0),
    "session": os.getsid,
    "group": os.getpgid,
    "priority": lambda pid: os.getpriority(os.PRIO_PROCESS, pid),
    "slow down": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "processors": os.sched_getaffinity,
    "limits": lambda pid: resource.prlimit(pid, resource.RLIMIT_AS),
    "pidfd": os.pidfd_open,
    "proc": lambda pid: os.listdir(f"/proc/{{pid}}/fd"),
    "memory": lambda pid: open(f"/proc/{{pid}}/mem"),
    "ptrace": lambda pid: answer((101, 117)[arm], 16, pid, 0, 0),
    "process_vm_readv": lambda pid: answer((310, 270)[arm], pid, 0, 0, 0, 0, 0),
}}
def answer(*arguments):
    if system(*arguments) < 0:
        raise OSError
def reached(pids):
    found = set()
    for name, attempt in attempts.items():
        for pid in pids:
            try:
                attempt(pid)
                found.add((name, pid))
            except OSError:
                pass
    return found
"""
ROWS = 64


def _starting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sandboxes ran when each one was started, filled by the calls to come."""
    seen: list[int] = []
    running: list[subprocess.Popen[bytes]] = []
    started = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        seen.append(sum(process.poll() is None for process in running))
        running.append(started(*arguments, **options))
        return running[-1]

    monkeypatch.setattr(sandbox.subprocess, "Popen", start)
    return seen


@needs_bubblewrap
@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
def test_no_process_of_the_sandbox_beside_it_is_reached_from_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own process ids; of its own sandbox a row may ask for what harms nobody."""
    monkeypatch.setattr(sandbox, "_count_sandboxes", lambda rows, memory_bytes: 2)
    mine = "{name for name, pid in found} <= {'session', 'group', 'priority', 'processors'}"
    pids = "{pid for name, pid in found} <= {1, os.getpid()}"
    tests = ["import os", "found = reached(range(1, 2000))", f"assert {mine}, found", f"assert {pids}, found"]
    assert set(run_tests([(REACH, tests)] * ROWS, timeout_seconds=10)) == {RowResult("passed")}


@pytest.mark.skipif(not FILTERED, reason="the filter of system calls knows x86_64 and aarch64 on Linux")
def test_no_process_of_the_sandbox_beside_it_is_reached_behind_guard_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandboxes see one another's ids and have one user: with a gap in the allow-list, the filter refuses all."""
    source = sandbox._CHILD.read_text()
    gaps = {
        "if listed and (reason := refusal([tree, *checks])):": "if False:",
        "known = {name: known[name] for name in BUILTINS} | {": "known = known | {",
    }
    for line, gap in gaps.items():
        assert source.count(line) == 1
        source = source.replace(line, gap)
    child = tmp_path / "child.py"
    child.write_text(source.replace("import ast\n", "import ast, inspect, resource\n", 1))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    monkeypatch.setattr(sandbox, "_count_sandboxes", lambda rows, memory_bytes: 2)
    tests = [
        "import os",
        "me = os.getpid()",
        "found = reached([1, os.getppid(), *range(me - 50, me + 50)])",
        "assert not found, found",
    ]
    assert set(run_tests([(REACH, tests)] * ROWS, timeout_seconds=10)) == {RowResult("passed")}


@pytest.mark.parametrize(
    ("rows", "processors", "free", "sandboxes"),
    [(0, 8, 2**33, 1), (31, 8, 2**33, 1), (32, 8, 2**33, 2), (10**4, 8, 2**33, 8), (10**4, 99, 2**40, 8),
     (10**4, 3, 2**33, 3), (10**4, 8, 2**31, 4), (10**4, 8, 2**20, 1)],
)  # fmt: skip
def test_sandboxes_do_not_take_more_than_the_machine_has(
    rows: int, processors: int, free: int, sandboxes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else rows that use all that they may would take the processor, or the memory, of the rows beside them."""
    monkeypatch.setattr(sandbox, "available_processors", lambda: processors)
    monkeypatch.setattr(sandbox, "available_memory", lambda: free)
    assert sandbox._count_sandboxes(rows, 2**29) == sandboxes


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
def test_a_full_disk_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of correct rows would be counted as errors."""
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, leave=3 * 4096)
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        monkeypatch.setattr(sandbox, "_count_sandboxes", lambda rows, memory_bytes: 1)
        assert {result for result in run_tests([("", ["assert 1"])] * 300)} == {RowResult("passed")}


def test_sandboxes_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sandbox is started while the first one runs."""
    monkeypatch.setattr(sandbox, "available_processors", lambda: 2)
    seen = _starting(monkeypatch)
    assert {result.outcome for result in run_tests([("x = 1", ["assert x"])] * 32)} == {"passed"}
    assert seen == [0, 1]  # processes that ran when each was started
