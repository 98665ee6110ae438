"""No process of a sandbox remains: after a call, after kill -9 of the calling process, after an interruption."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.sandbox import guards as sandbox
from ops.sandbox.guards import run_tests

ROOT = Path(__file__).resolve().parents[3]
# A broken bubblewrap is not skipped: it fails these tests.
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def _descendants(pid: int) -> set[int]:
    """Living processes below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.fixture
def _adopts_orphans() -> Iterator[None]:
    """Makes orphans children of this process, so that they are noticed."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1, 0, 0, 0)
    yield
    prctl(set_child_subreaper, 0, 0, 0, 0)


LOOPS = [("while True: pass", ["assert True"]), ("import os\nwhile True: os.getpid()", ["assert True"])]
BEHIND_EACH_GUARD = [
    pytest.param(LOOPS[0], id="guard 1"),
    pytest.param(LOOPS[1], id="bubblewrap", marks=needs_bubblewrap),
]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.usefixtures("_adopts_orphans")
def test_no_process_remains() -> None:
    """After a call with endless loops and fork bombs there are no new processes."""
    before = _descendants(os.getpid())
    bomb = ("import os\nos.setsid()\nwhile True:\n    try: os.fork()\n    except OSError: pass", ["assert True"])
    assert "passed" not in {result.outcome for result in run_tests([*LOOPS, bomb], timeout_seconds=0.5)}
    assert _descendants(os.getpid()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.usefixtures("_adopts_orphans")
@pytest.mark.parametrize("row", BEHIND_EACH_GUARD)
def test_the_sandbox_dies_with_its_caller(row: tuple[str, list[str]]) -> None:
    """kill -9 of the calling process leaves no process, although the row would have taken a minute."""
    before = _descendants(os.getpid())
    script = f"""from ops.sandbox import guards
guards._count_sandboxes = lambda rows, memory_bytes: 2
guards.run_tests([{row!r}] * 2, timeout_seconds=60)"""
    caller = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _busy(_descendants(caller.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait(timeout=30)
    assert _remaining(before) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.usefixtures("_adopts_orphans")
@pytest.mark.parametrize("row", BEHIND_EACH_GUARD)
@pytest.mark.parametrize("sandboxes", [1, 2])
def test_an_interrupted_call_leaves_no_process(
    row: tuple[str, list[str]], sandboxes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or any other exception, ends the rows too, although the calling process lives on."""
    monkeypatch.setattr(sandbox, "_count_sandboxes", lambda rows, memory_bytes: sandboxes)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = _descendants(os.getpid())
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tests([row] * sandboxes, timeout_seconds=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert _remaining(before) == set()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.usefixtures("_adopts_orphans")
def test_a_call_that_is_interrupted_while_a_sandbox_starts_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come when the process exists, and before any row is waited for."""
    cleanup = tempfile.TemporaryDirectory.cleanup

    def interrupted(directory: tempfile.TemporaryDirectory[str]) -> None:
        cleanup(directory)
        raise KeyboardInterrupt

    before = _descendants(os.getpid())
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tests([LOOPS[0]], timeout_seconds=60)
    assert _remaining(before) == set()


@pytest.mark.parametrize("without", ["", "pidfd_open"])
def test_a_sandbox_that_hangs_is_killed(without: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends even if the program that runs the rows does not answer, with and without a descriptor of it."""
    if without:
        monkeypatch.delattr(os, without)
    child = tmp_path / "child.py"
    child.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(sandbox, "_CHILD", child)
    monkeypatch.setattr(sandbox, "_SECONDS_TO_START", 0.2)
    started = time.monotonic()
    (result,) = run_tests([("x = 1", ["assert x"])], timeout_seconds=0.1)
    assert result.outcome == "error"
    assert "ended early" in result.reason
    assert time.monotonic() - started < 30


def _remaining(before: set[int]) -> set[int]:
    """New processes that still exist after ten seconds; they are killed here."""
    deadline = time.monotonic() + 10
    while (left := _descendants(os.getpid()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _busy(pids: set[int]) -> bool:
    """Whether one of them has used 0.3 s of CPU time: only the row does, since starting takes less."""
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[11]) + int(fields[12]) > 0.3 * os.sysconf("SC_CLK_TCK"):
            return True
    return False
