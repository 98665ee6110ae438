"""Servers, worker and watcher for tests, started and killed one by one; `make up` would restart them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from made_up import BIN, FOREIGN, MAKE, ROOT, free_ports, wait_for

FILE_LEASES = "prefect.server.concurrency.lease_storage.filesystem"


@dataclass(frozen=True)
class Installation:
    """Two servers and a worker, started in a directory outside the checkout."""

    cwd: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def tracking(self) -> str:
        return self.environment["MLFLOW_TRACKING_URI"]

    @property
    def base(self) -> Path:
        """Directory of its data, logs and databases."""
        return self.cwd.parent

    def training(self, seed: int) -> Path:
        """The directory of the training with that seed, while it is there."""
        (found,) = [
            path.parent
            for path in (self.base / "data" / "trainings").glob("*/training.json")
            if json.loads(path.read_text())["config"]["seed"] == seed
        ]
        return found

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's REST API."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.environment["PREFECT_API_URL"] + path, data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a process that keeps running; its output is appended to NAME.log."""
        with (self.base / f"{name}.log").open("ab") as stream:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=self.cwd,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_prefect(self) -> None:
        """Start Prefect's server and wait until it answers."""
        port = self.environment["PREFECT_API_URL"].rsplit(":", 1)[1].split("/")[0]
        self.start(
            "prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port,
            PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS="2",
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=FILE_LEASES,
        )  # fmt: skip
        wait_for("Prefect's server", lambda: self.api("/health"), 90)

    def start_mlflow(self, **settings: str) -> None:
        """Start MLflow's server and wait until it answers; by default on sqlite and a folder."""
        folders = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.base}/mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.base / "artifacts"),
        }
        self.start(
            "mlflow", "mlflow", "--env-file", str(ROOT / "mlflow" / "server.env"), "server",
            MLFLOW_PORT=self.tracking.rsplit(":", 1)[1], **{**folders, **settings},
        )  # fmt: skip
        wait_for("MLflow's server", lambda: urlopen(self.tracking + "/health", timeout=5).status == 200, 90)

    def start_worker(self) -> None:
        self.start("worker", "prefect", "worker", "start", "--pool", "gpu", "--name", platform.node())

    def start_watcher(self) -> None:
        self.start("watch", "python", "-m", "ops.recovery.watch")

    def kill(self, name: str) -> None:
        """kill -9 a started process and its process group: servers have children."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def command(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that ends by itself, with its output in a pipe."""
        return subprocess.Popen(
            command, cwd=self.cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def deploy(self) -> str:
        """``make deploy`` from another directory, with the environment of this interpreter. Returns the output."""
        made = self.command(*MAKE, "deploy")
        output, _ = made.communicate(timeout=120)
        assert made.returncode == 0, output[-3000:]
        return output

    def run(self, *parameters: str, deployment: str = "finetune/tiny") -> subprocess.Popen[str]:
        """``prefect deployment run DEPLOYMENT -p ... --watch``."""
        options = [option for parameter in parameters for option in ("-p", parameter)]
        return self.command(str(BIN / "prefect"), "deployment", "run", deployment, *options, "--watch")

    def stop(self) -> None:
        """End all started processes and their descendants: a flow run would outlive its worker."""
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("the end of every process", lambda: not self.descendants(), 10)

    def descendants(self, name: str = "PREFECT_HOME", value: str = "") -> list[int]:
        """Ids of processes with this variable in their environment; by default all processes of this installation."""
        mark = f"{name}={value or self.environment[name]}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # another user's process, or it has ended
                continue
        return found


@contextlib.contextmanager
def installed(
    base: Path, worker: bool = True, mlflow: Mapping[str, str] | None = None, **settings: str
) -> Iterator[Installation]:
    """Start a fresh installation: both servers, all deployments, one worker. All processes are ended afterwards.

    Args:
        base: an empty folder.
        worker: whether a worker is started.
        mlflow: environment variables of MLflow's server alone.
        settings: environment variables of all its processes.
    """
    cwd = base / "elsewhere"
    cwd.mkdir()
    prefect_port, mlflow_port = free_ports(2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | {
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": str(ROOT),
        "FINETUNE_DATA_ROOT": str(base / "data"),
        "FINETUNE_LOCKS": str(base / "locks"),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "PREFECT_HOME": str(base / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Poll for runs twice a second instead of every ten seconds.
        "PREFECT_WORKER_QUERY_SECONDS": "0.5",
        **settings,
    }
    installation = Installation(cwd, environment)
    try:
        installation.start_prefect()
        installation.start_mlflow(**mlflow or {})
        installation.deploy()
        if worker:
            installation.start_worker()
        yield installation
    finally:
        installation.stop()
