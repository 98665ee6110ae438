"""``make up`` for tests: on free ports, with a separate data root, and no process left afterwards."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ops.machine.process import Process, end_processes, tagged
from ops.servers import TAG_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# With the environment of this interpreter; `make` itself would install another.
MAKE = ("make", "-C", str(ROOT), "-o", ".venv/.installed", f"BIN={BIN}")
FOREIGN = ("PREFECT_", "MLFLOW_", "FINETUNE_")


def free_ports(count: int) -> list[int]:
    """Different loopback ports that no process listens on now."""
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def end_daemons(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes, the last one first; those that do not end within 20 s are killed."""
    for daemon in reversed(started):
        daemon.terminate()
    for daemon in reversed(started):
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def wait_for(what: str, ready: Callable[[], Any], seconds: float) -> Any:
    """Poll until ``ready`` returns a truthy value, and return it; an OSError (connection refused) counts as false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            if answer := ready():
                return answer
        time.sleep(0.25)
    raise AssertionError(f"timeout after {seconds:g} s: {what}")


@contextmanager
def made_up(base: Path, **settings: str) -> Iterator[MadeUp]:
    """A started ``make up``; all its processes are ended afterwards. Arguments as ``MadeUp``."""
    made = MadeUp(base, **settings)
    try:
        made.start()
        yield made
    finally:
        made.stop()


class MadeUp:
    """A ``make up`` with its settings and processes.

    Args:
        base: an empty folder.
        root: name of the data root in it.
        settings: environment variables in addition to ports and data root.
    """

    def __init__(self, base: Path, root: str = "root", **settings: str):
        self.home = base / root / "server"
        self.cwd = base / "elsewhere"  # outside the checkout
        self.cwd.mkdir(parents=True)
        prefect, mlflow = free_ports(2)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",  # a complete log even if its writer is killed
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
        """The output of ``make up`` so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def password(self) -> str | None:
        """Password of the secured profile; None without it."""
        path = self.home / "password"
        return path.read_text() if path.exists() else None

    @property
    def client_environment(self) -> dict[str, str]:
        """The environment of a shell after sourcing client.env."""
        source = f". {shlex.quote(str(self.home / 'client.env'))}; env -0"
        output = subprocess.run(["bash", "-c", source], env=self.environment, capture_output=True, check=True).stdout
        return dict(pair.split("=", 1) for pair in output.decode().split("\0") if "=" in pair)

    def begin(self) -> None:
        """Start it in a separate process group, as a shell does."""
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*MAKE, "up"], cwd=self.cwd, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def start(self) -> float:
        """Start it and wait until it prints that it is ready. Returns the seconds that this took."""
        began = time.monotonic()
        self.begin()

        def ready() -> bool:
            assert self.process
            assert self.process.poll() is None, self.output
            return "Ctrl-C ends it" in self.output

        wait_for("ready", ready, 180)
        return time.monotonic() - began

    def interrupt(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C: send the signal to the whole process group, as a terminal does. Returns the exit status."""
        assert self.process
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=120)

    def stop(self) -> None:
        """End it, if it is still running, and all processes that it started."""
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
        """Run another make command with the same settings, and with client.env sourced if it exists."""
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
        """The id of the flow run, from the output of `run`."""
        found = re.search(r"UUID: (\S+)", output)
        assert found, output
        return found[1]

    def memory(self) -> dict[str, float]:
        """Memory of each process in MB, shared pages divided among their users (PSS)."""
        return {
            str(process): int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024  # type: ignore[index]
            for process in self.processes()
            if (text := Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        }
