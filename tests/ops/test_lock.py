"""The device lock: exclusive between processes, and free the moment its holder dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ops.lock import exclusive

HOLD = """
import sys, time
from pathlib import Path
from ops.lock import exclusive
with exclusive(Path(sys.argv[1]), "cuda:0", "the holder", print):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_killed_holder_frees_the_device(tmp_path: Path) -> None:
    """Who waits is told for whom; kill -9 of the holder lets the next one in at once."""
    process = _holder(tmp_path)
    said: list[str] = []

    def log(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            os.kill(process.pid, signal.SIGKILL)

    try:
        started = time.monotonic()
        with exclusive(tmp_path, "cuda:0", "the next", log):
            assert time.monotonic() - started < 30
        assert "the holder" in said[0]
        assert str(process.pid) in said[0]
    finally:
        process.kill()
        process.wait()


def test_devices_are_locked_apart(tmp_path: Path) -> None:
    """A run on one GPU does not wait for a run on another."""
    process = _holder(tmp_path)
    said: list[str] = []
    try:
        with exclusive(tmp_path, "cuda:1", "another", said.append):
            assert said == []
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    """An exception in the block releases the device."""
    try:
        with exclusive(tmp_path, "cpu", "first", print):
            raise RuntimeError("injected")
    except RuntimeError:
        pass
    said: list[str] = []
    with exclusive(tmp_path, "cpu", "second", said.append):
        assert said == []
