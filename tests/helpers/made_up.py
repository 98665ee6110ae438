"""``make up`` for tests: on free ports and a data root of its own, and nothing of it left afterwards."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ops.machine.process import Process, end_processes, tagged
from ops.servers import TAG_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# This interpreter's environment as the installed one; `make` itself would install another.
MAKE = ("make", "-C", str(ROOT), "-o", ".venv/.installed", f"BIN={BIN}")
FOREIGN = ("PREFECT_", "MLFLOW_", "FINETUNE_")


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on now."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def wait_for(what: str, ready: Callable[[], Any], seconds: float) -> Any:
    """Poll until something truthy comes back; to be refused a connection counts as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            if answer := ready():
                return answer
        time.sleep(0.25)
    raise AssertionError(f"{what} did not come in {seconds:g} s")


class MadeUp:
    """Settings of a ``make up``, and the one that runs with them.

    Args:
        base: an empty folder.
        settings: environment variables beside ports and data root.
    """

    def __init__(self, base: Path, **settings: str):
        self.home = base / "root" / "server"
        self.cwd = base / "elsewhere"  # has nothing to do with the checkout
        self.cwd.mkdir(parents=True)
        prefect, mlflow = free_ports(2)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # a log that is whole even when its writer is killed
            "FINETUNE_DATA_ROOT": str(self.home.parent),
            "FINETUNE_PREFECT_PORT": str(prefect),
            "FINETUNE_MLFLOW_PORT": str(mlflow),
            **settings,
        }
        self.prefect = f"http://127.0.0.1:{prefect}"
        self.mlflow = f"http://127.0.0.1:{mlflow}"
        self.log = base / "make-up.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        """What ``make up`` has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def password(self) -> str | None:
        """Of the secured profile."""
        path = self.home / "password"
        return path.read_text() if path.exists() else None

    @property
    def client_environment(self) -> dict[str, str]:
        """What sourcing client.env gives to a shell."""
        source = f". {self.home / 'client.env'}; env -0"
        told = subprocess.run(["bash", "-c", source], env=self.environment, capture_output=True, check=True).stdout
        return dict(pair.split("=", 1) for pair in told.decode().split("\0") if "=" in pair)

    def begin(self) -> None:
        """Start it in a process group of its own, as a shell does."""
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*MAKE, "up"], cwd=self.cwd, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def start(self) -> float:
        """Start it and wait until it says that it is ready. Returns the seconds that this took."""
        began = time.monotonic()
        self.begin()

        def ready() -> bool:
            assert self.process
            assert self.process.poll() is None, self.output
            return "Ctrl-C ends it" in self.output

        wait_for("ready", ready, 180)
        return time.monotonic() - began

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C: the signal to the whole group, as the terminal sends it. Returns the exit status."""
        assert self.process
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=120)

    def stop(self) -> None:
        """End it, however it stands, and all that it started."""
        if self.process and self.process.poll() is None:
            self.interrupt(signal.SIGTERM)
        end_processes(self.processes, 5)
        assert not self.processes()

    def processes(self, *words: str) -> list[Process]:
        """All living processes that it started, or those with all the words in their command."""
        return [p for p in tagged(TAG_VARIABLE, str(self.home)) if all(word in p.command for word in words)]

    def one(self, *words: str) -> Process:
        """The oldest process with these words in its command."""
        found = self.processes(*words)
        assert found, [str(process) for process in self.processes()]
        return found[0]

    def make(self, *target: str) -> subprocess.CompletedProcess[str]:
        """Another make command with the same settings, and with client.env sourced if it is there."""
        environment = self.client_environment if (self.home / "client.env").exists() else self.environment
        return subprocess.run(
            [*MAKE, *target], cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
        )  # fmt: skip

    def api(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        """Ask Prefect's REST API."""
        headers = {"Content-Type": "application/json"}
        if self.password:
            headers["Authorization"] = "Basic " + base64.b64encode(f"admin:{self.password}".encode()).decode()
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"{self.prefect}/api{path}", data, headers, method=method), timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def run(self, *parameters: str, deployment: str = "tiny", watch: bool = True) -> subprocess.Popen[str]:
        """``prefect deployment run finetune/tiny -p ... --watch``, with client.env sourced."""
        options = [option for parameter in parameters for option in ("-p", parameter)]
        return subprocess.Popen(
            [str(BIN / "prefect"), "deployment", "run", f"finetune/{deployment}", *options, *["--watch"] * watch],
            cwd=self.cwd, env=self.client_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def flow_run(self, output: str) -> str:
        """The id of the run that `run` printed."""
        found = re.search(r"UUID: (\S+)", output)
        assert found, output
        return found[1]

    def memory(self) -> dict[str, float]:
        """MB of memory by process, shared pages shared out (PSS)."""
        return {
            str(process): int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024  # type: ignore[index]
            for process in self.processes()
            if (text := Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        }
