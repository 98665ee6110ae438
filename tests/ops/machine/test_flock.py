"""A lock on a file: exclusive between processes, free when its holder ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ops.machine.flock import hold_file, try_lock

HOLD = """
import sys
from pathlib import Path
from ops.machine.flock import hold_file
with hold_file(Path(sys.argv[1]), wait=False) as stream:
    print("held" if stream else "refused", flush=True)
    input()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    """A process that holds the file until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_is_held_by_one_process(tmp_path: Path) -> None:
    """Without waiting a held file gives None; its content stays, and a killed holder frees it."""
    path = tmp_path / "a.lock"
    path.write_text("content")
    process = _holder(path)
    try:
        with hold_file(path, wait=False) as stream:
            assert stream is None
        process.kill()
        process.wait()
        with hold_file(path, wait=False) as stream:
            assert stream is not None
            stream.seek(0)
            assert stream.read() == "content"
    finally:
        process.kill()
        process.communicate()


def test_waiting_lasts_until_the_holder_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    process = _holder(path)
    threading.Timer(0.5, process.kill).start()
    began = time.monotonic()
    with hold_file(path, wait=True) as stream:
        assert stream is not None
        assert 0.3 < time.monotonic() - began < 30
    process.communicate()


def test_an_error_in_the_block_frees_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with pytest.raises(RuntimeError, match="injected"), hold_file(path, wait=False):
        raise RuntimeError("injected")
    with hold_file(path, wait=False) as stream:
        assert stream is not None


def test_readers_share_a_lock(tmp_path: Path) -> None:
    """Two descriptors of one file may share its lock; an exclusive holder excludes both kinds."""
    path = tmp_path / "a.lock"
    with path.open("w") as one, path.open() as two, path.open() as three:
        assert try_lock(one.fileno(), shared=True)
        assert try_lock(two.fileno(), shared=True)
        assert not try_lock(three.fileno())
