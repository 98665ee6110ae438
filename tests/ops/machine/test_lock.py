"""Device locks: exclusive between processes, free when their holder dies, kept by a child that inherited them."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.machine.lock import exclusive, exclusive_any, exclusive_if_free, exclusive_several
from ops.machine.lock_file import read_locks, shared_directory
from ops.settings import Settings

# Holds the first free one of the named devices, prints which, and starts a child that inherits the lock if told to.
HOLD = """
import subprocess, sys, time
from pathlib import Path
from ops.machine.lock import exclusive_any
directory, name, child, *devices = sys.argv[1:]
with exclusive_any(Path(directory), devices, name, lambda line: print(line, flush=True)) as held:
    pid = 0
    if child == "child":
        pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[held.descriptor],
            stdout=subprocess.DEVNULL).pid
    print("held", held.what, pid, flush=True)
    time.sleep(60)
"""
# Takes several devices again and again, each time for a moment, and prints a line each time.
TAKE = """
import sys, time
from pathlib import Path
from ops.machine.lock import exclusive_several
directory, name, count, times, seconds, turn, *devices = sys.argv[1:]
for _ in range(int(times)):
    with exclusive_several(Path(directory), devices, int(count), name, lambda line: None, turn=turn) as held:
        print(*(each.what for each in held), flush=True)
        time.sleep(float(seconds))
"""
THREE = ("gpu a", "gpu b", "gpu c")
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """hold(name, *devices): a process that takes the first free device, or waits; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *devices: str, child: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), name, "child" if child else "-", *devices]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_holder_frees_the_device(tmp_path: Path, hold: Hold) -> None:
    """A waiting process logs who holds the lock, and gets it at once after kill -9 of the holder."""
    process = hold("the holder", "cuda:0")
    assert _line(process) == "held cuda:0 0"
    said: list[str] = []
    shown: list[str | None] = []

    def log(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            os.kill(process.pid, signal.SIGKILL)

    started = time.monotonic()
    with exclusive(tmp_path, "cuda:0", "the next", log, show=shown.append):
        assert time.monotonic() - started < 10
    assert "the holder" in said[0]
    assert f"pid {process.pid}" in said[0]
    assert said[-1] == "cuda:0 is free: going on"
    assert shown == [said[0], None]


def test_a_device_is_taken_only_if_it_is_free(tmp_path: Path, hold: Hold) -> None:
    """Without waiting: the second device while the first is held, and none while both are."""
    process = hold("the holder", "cuda:0")
    assert _line(process) == "held cuda:0 0"
    with exclusive_if_free(tmp_path, ["cuda:0", "cuda:1"], "a helper", "a flow run") as held:
        assert held is not None
        assert held.what == "cuda:1"
        (lock,) = [lock for lock in read_locks(tmp_path) if lock.what == "cuda:1"]
        assert (lock.held, lock.holder, lock.flow_run_id) == (True, "a helper", "a flow run")
        assert lock.pids == [os.getpid()]
        with exclusive_if_free(tmp_path, ["cuda:0", "cuda:1"], "another") as none:
            assert none is None
    with exclusive_if_free(tmp_path, ["cuda:1"], "another") as held:
        assert held is not None


def test_a_living_child_keeps_the_device(tmp_path: Path, hold: Hold) -> None:
    """The holder is dead, but a child that inherited the lock still computes: others wait, and its pid is named."""
    process = hold("the holder", "cuda:0", child=True)
    child = int(_line(process).split()[2])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            (lock,) = read_locks(tmp_path)
            assert lock.held
            assert lock.pids == [child]
            assert lock.owner is not None
            assert lock.owner.is_dead
            os.kill(child, signal.SIGKILL)

    with exclusive(tmp_path, "cuda:0", "the next", log):
        assert "the holder" in said[0]
        assert f"held by pid {child}, left behind by the holder (pid {process.pid}, " in said[0]


def test_each_device_has_one_holder(hold: Hold) -> None:
    """Two devices have two holders; a third process waits for both, names both, and gets the first free one."""
    first, second = hold("one", "cuda:0", "cuda:1"), hold("two", "cuda:0", "cuda:1")
    held = {_line(first): first, _line(second): second}
    assert set(held) == {"held cuda:0 0", "held cuda:1 0"}
    third = hold("three", "cuda:0", "cuda:1")
    waits = _line(third)
    assert waits.startswith("waiting for cuda:0, held by ")
    assert "or cuda:1, held by " in waits
    assert "one (pid" in waits
    assert "two (pid" in waits
    held["held cuda:1 0"].kill()
    assert _line(third) == "cuda:1 is free: going on"
    assert _line(third) == "held cuda:1 0"


def test_each_device_has_its_own_lock(tmp_path: Path, hold: Hold) -> None:
    """A run on one GPU does not wait for a run on another."""
    process = hold("one", "cuda:0")
    assert _line(process) == "held cuda:0 0"
    said: list[str] = []
    with exclusive(tmp_path, "cuda:1", "another", said.append):
        assert said == []
        assert process.poll() is None


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    """An exception in the block frees the device."""
    with pytest.raises(RuntimeError, match="injected"), exclusive(tmp_path, "cpu", "first", print):
        raise RuntimeError("injected")
    said: list[str] = []
    with exclusive(tmp_path, "cpu", "second", said.append):
        assert said == []
    assert [lock.held for lock in read_locks(tmp_path)] == [False]


def test_reading_a_lock_does_not_take_it(tmp_path: Path) -> None:
    """Its state is read while it is held, and its content stays."""
    with exclusive_any(tmp_path, ["gpu GPU-1"], "me", print, flow_run_id="an-id"):
        for _ in range(3):
            (lock,) = read_locks(tmp_path)
            assert (lock.what, lock.held, lock.holder, lock.flow_run_id) == ("gpu GPU-1", True, "me", "an-id")
            assert lock.owner is not None
            assert lock.owner.pid == os.getpid()
            assert not lock.owner.is_dead
            assert lock.pids == [os.getpid()]


def test_a_removed_lock_file_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed between opening and locking, as by a cleaner of /tmp: the lock is taken on a new file."""
    path = tmp_path / "cpu.lock"
    flock, removed = fcntl.flock, []

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(path)
        flock(descriptor, operation)

    monkeypatch.setattr("ops.machine.flock.fcntl.flock", flock_after_removal)
    with exclusive(tmp_path, "cpu", "me", print) as held:
        assert removed
        assert os.path.samestat(os.fstat(held.descriptor), path.stat())


def test_a_child_outlives_the_block(tmp_path: Path) -> None:
    """The run has ended without an error, but its child has not: the device is not free."""
    with exclusive(tmp_path, "cpu", "me", print) as held:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held.descriptor])
    try:
        (lock,) = read_locks(tmp_path)
        assert lock.held
        assert lock.pids == [child.pid]
    finally:
        child.kill()
        child.wait()
    assert [lock.held for lock in read_locks(tmp_path)] == [False]


def test_a_holder_that_opens_and_closes_files_is_found(tmp_path: Path) -> None:
    """Descriptors are closed while their list is read, as in every starting program; that of the lock stays."""
    busy = "import os, sys\nprint(flush=True)\nwhile True: [os.close(os.dup(0)) for _ in range(9)]"
    with exclusive(tmp_path, "cpu", "me", print) as held:
        child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, pass_fds=[held.descriptor])
    try:
        assert child.stdout is not None
        child.stdout.readline()
        (lock,) = read_locks(tmp_path)
        assert [lock.pids for _ in range(100)] == [[child.pid]] * 100
    finally:
        child.kill()
        child.communicate()


def test_every_user_may_lock(tmp_path: Path) -> None:
    """The folder has the mode of /tmp, and every user can lock the files, whatever the umask."""
    before = os.umask(0o077)
    try:
        directory = shared_directory(tmp_path / "locks")
        assert shared_directory(directory) == directory
        with exclusive(directory, "cpu", "me", print):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o1777
    assert stat.S_IMODE((directory / "cpu.lock").stat().st_mode) == 0o666


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Another user could have created it, to redirect the lock files."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError, match="FINETUNE_LOCKS"):
        shared_directory(tmp_path / "locks")


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """configured(path): the folder of the device locks with FINETUNE_LOCKS=path, as the settings give it."""

    def configure(path: Path) -> Path:
        monkeypatch.setenv("FINETUNE_LOCKS", str(path))
        return Settings.load().device_locks

    tmp_path.chmod(0o700)
    return configure


def test_the_settings_keep_a_link_visible(tmp_path: Path, configured: Callable[[Path], Path]) -> None:
    """FINETUNE_LOCKS is a link, as another user could make one in /tmp: refused, and nothing is created elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "locks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError, match="FINETUNE_LOCKS"):
        shared_directory(configured(tmp_path / "locks"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="FINETUNE_LOCKS"):
        shared_directory(configured(tmp_path / "dangling"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_another_user_could_replace_is_refused(
    tmp_path: Path, configured: Callable[[Path], Path]
) -> None:
    """Its parent may be written by all: the error names that parent, and nothing is created."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match=f"replace {tmp_path / 'open'}, .*FINETUNE_LOCKS"):
        shared_directory(configured(tmp_path / "open" / "locks"))
    assert list((tmp_path / "open").iterdir()) == []


def test_a_link_of_ones_own_on_the_way_is_followed(tmp_path: Path, configured: Callable[[Path], Path]) -> None:
    """/var/lock, for example, is a link of root's to /run/lock."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    shared_directory(configured(tmp_path / "link" / "locks"))
    assert (tmp_path / "real" / "locks").is_dir()


def test_a_folder_that_becomes_a_link_is_not_followed(tmp_path: Path, configured: Callable[[Path], Path]) -> None:
    """Its owner replaces it after it was checked."""
    directory = shared_directory(configured(tmp_path / "locks"))
    (tmp_path / "elsewhere").mkdir()
    directory.rmdir()
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="locks"), exclusive(directory, "cpu", "me", print):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
def test_a_lock_file_that_leads_elsewhere_is_refused(kind: str, tmp_path: Path) -> None:
    """What it leads to keeps its content, and the call does not hang."""
    victim, lock = tmp_path / "victim", tmp_path / "locks" / "cpu.lock"
    victim.write_text("content")
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "second name":
        lock.hardlink_to(victim)
    else:
        os.mkfifo(lock)
    (state,) = read_locks(lock.parent)
    assert (state.held, state.owner) == (False, None)
    with pytest.raises(OSError, match=str(lock)), exclusive(lock.parent, "cpu", "me", print):
        pass
    assert victim.read_text() == "content"


def test_a_lock_file_with_foreign_content_still_locks(tmp_path: Path) -> None:
    """Every user may write into it: the holder is shown as unknown, and the lock works."""
    (tmp_path / "cpu.lock").write_text('{"process": [1, 2]')
    with exclusive(tmp_path, "cpu", "me", print):
        pass
    for content in ("\0", "[" * 4000, '{"process": "[]", "what": 1}'):
        (tmp_path / "cpu.lock").write_text(content)
        (lock,) = read_locks(tmp_path)
        assert (lock.held, lock.owner) == (False, None)


@pytest.fixture
def take(tmp_path: Path) -> Iterator[Hold]:
    """take(name, count, times, seconds, *devices): a process that holds ``count`` of the devices again and again."""
    started: list[subprocess.Popen[str]] = []

    def start(
        name: str, count: int, times: int, seconds: float, *devices: str, turn: str = "several"
    ) -> subprocess.Popen[str]:
        words = [str(tmp_path), name, str(count), str(times), str(seconds), turn, *devices]
        started.append(subprocess.Popen([sys.executable, "-c", TAKE, *words], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_runs_of_two_devices_do_not_deadlock_on_three(take: Hold) -> None:
    """Each takes two of three devices ten times, in opposite orders; both come to their end."""
    runs = [take("one", 2, 10, 0.02, *THREE), take("two", 2, 10, 0.02, *reversed(THREE))]
    for run in runs:
        output, _ = run.communicate(timeout=60)
        assert len(output.splitlines()) == 10
        assert {len(line.split("gpu ")) for line in output.splitlines()} == {3}


def test_several_devices_are_taken_together_or_not_at_all(tmp_path: Path, hold: Hold, take: Hold) -> None:
    """While one of two is held, a run that waits for both holds neither, and says for how many it waits and why."""
    holder = hold("the holder", "gpu a")
    assert _line(holder) == "held gpu a 0"
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            assert {lock.what: lock.held for lock in read_locks(tmp_path)} == {
                "gpu a": True, "gpu-b": False, "several": True,
            }  # fmt: skip
            holder.kill()

    with exclusive_several(tmp_path, THREE[:2], 2, "the next", log, turn="several") as held:
        assert [each.what for each in held] == ["gpu a", "gpu b"]
        assert [lock.pids for lock in read_locks(tmp_path) if lock.held] == [[os.getpid()]] * 2
    assert said[0].startswith("waiting for 2 of 2 devices: gpu a, held by the holder (pid ")
    assert said[-1] == "gpu a and gpu b are free: going on"
    assert not any(lock.held for lock in read_locks(tmp_path))


@pytest.mark.parametrize("turn", ["several", ""])
def test_who_waits_for_several_is_not_starved(tmp_path: Path, take: Hold, turn: str) -> None:
    """Two runs that take one of two devices each, again and again, let a run in that waits for both.

    Without the rule of turns, which the second case shows, it would not come in.
    """
    greedy = [take(f"run {number}", 1, 100, 0.9, *THREE[:2], turn=turn) for number in range(2)]
    for process in greedy:
        _line(process)
    waiting = take("the large one", 2, 1, 0.1, *THREE[:2], turn=turn)
    try:
        output, _ = waiting.communicate(timeout=10 if turn else 6)
    except subprocess.TimeoutExpired:
        assert turn == ""
        return
    assert turn == "several"
    assert output == "gpu a gpu b\n"
    others = [_line(process) for process in greedy]  # and they go on after it
    assert all(line.startswith("gpu ") for line in others)


def test_a_run_behind_one_that_waits_for_several_names_it(tmp_path: Path, hold: Hold, take: Hold) -> None:
    """It waits though a device is free, and goes on as soon as the other is killed."""
    holder = hold("the holder", "gpu a")
    assert _line(holder) == "held gpu a 0"
    large = take("the large one", 2, 1, 0.1, *THREE[:2])
    while not any(lock.what == "several" and lock.held for lock in read_locks(tmp_path)):
        time.sleep(0.05)
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            with exclusive_if_free(tmp_path, ["gpu b"], "a helper", turn="several") as none:
                assert none is None
            large.kill()

    with exclusive_several(tmp_path, THREE[:2], 1, "a small one", log, turn="several") as (held,):
        assert held.what == "gpu b"
    assert "; before it the large one (pid " in said[0]
    assert "which waits for several devices" in said[0]
