from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from fakehub import FakeHub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """sleeper(deaf=False, **variables): a process with these variables, which ignores SIGTERM if it is deaf."""
    started: list[subprocess.Popen[bytes]] = []

    def start(deaf: bool = False, **variables: str) -> subprocess.Popen[bytes]:
        code = "import signal, time; " + "signal.signal(15, signal.SIG_IGN); " * deaf
        code += "print(flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | variables, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
