"""Which process is meant by a mark: alive, dead, its number used again, another machine's, another container's."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ops.machine import process as marks
from ops.machine.process import ProcessMark, lock_holders, mark_process


def test_a_living_process_is_not_dead() -> None:
    """This one, and after a round trip through text."""
    mark = mark_process()
    assert mark.is_alive
    assert not mark.is_dead
    assert ProcessMark.from_json(mark.to_json()) == mark


def test_a_dead_process_is_dead() -> None:
    """As soon as it has ended, whether or not its parent has asked for its status."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = mark_process(process.pid)
    assert mark.started
    assert not mark.is_dead
    process.kill()
    process.wait()
    assert mark.is_dead


def test_a_zombie_is_dead() -> None:
    """Nobody waited for it, so its number is still there; it computes nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    mark = mark_process(process.pid)
    process.kill()
    assert process.stdout is not None
    process.stdout.read()
    deadline = time.monotonic() + 5
    while not mark.is_dead:
        assert time.monotonic() < deadline
    process.wait()


def test_a_number_used_again_is_another_process() -> None:
    """The same pid with another start time: the one that was meant is gone."""
    assert replace(mark_process(), started="1").is_dead


def test_a_restart_of_the_machine_ends_all() -> None:
    """Numbers and start times may come again by chance; the boot does not."""
    mark = mark_process()
    assert replace(mark, boot="00000000-0000-0000-0000-000000000000 " + mark.boot.split(" ")[1]).is_dead


def test_what_cannot_be_seen_is_left_alone() -> None:
    """Another machine's process, and one of another container on this kernel, may well be alive."""
    mark = mark_process()
    for other in (
        replace(mark, machine="another", started="1"),
        replace(mark, boot=mark.boot.split(" ")[0] + " pid:[1]", started="1"),
    ):
        assert not other.is_dead
        assert not other.is_alive


def test_anything_else_is_no_mark() -> None:
    """Tags are written by anybody."""
    for text in ("", "null", "{}", '{"pid": 1}', "[1]", "not json"):
        assert ProcessMark.from_json(text) is None


def test_the_same_inode_of_another_device_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up /proc, in which two processes hold locks of one inode number, one of them of this file."""
    path, other = tmp_path / "cpu.lock", tmp_path / "elsewhere"
    path.touch()
    other.touch()
    for pid, file in ((101, path), (102, other)):
        for folder in ("fdinfo", "fd"):
            (tmp_path / str(pid) / folder).mkdir(parents=True)
        told = f"pos:\t0\nlock:\t1: FLOCK  ADVISORY  WRITE {pid} 00:{pid}:{path.stat().st_ino} 0 EOF\n"
        (tmp_path / str(pid) / "fdinfo" / "3").write_text(told)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(file)
    monkeypatch.setattr(marks, "_PROC", tmp_path)
    assert lock_holders(path) == [101]
