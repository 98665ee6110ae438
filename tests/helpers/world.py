"""Runs of the flow, each in its own process, with servers that a test can kill; there is no worker."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from installation import FILE_LEASES
from made_up import BIN, FOREIGN, ROOT, free_ports, wait_for

RUN = """
import json, sys
from flows.finetune import finetune
state = finetune(**json.loads(sys.argv[1]), return_state=True)
print(state.name, state.message)
"""
SHORT = {
    "model_size": "tiny", "dataset": "demo", "max_steps": 2, "sample_rows": 1, "pass_rows": 0, "eval_rows": 20,
    "max_new_tokens": 4, "device": "cpu", "batch_size": 4, "precision": "fp32",
}  # fmt: skip


class World:
    """A data root, Prefect's home, and servers, all in one folder; a context manager that ends the processes.

    Without ``start_prefect`` each run has Prefect's temporary server; all write the same database. Without
    ``start_mlflow`` MLflow is the sqlite file ``mlflow.db`` in the data root.

    Args:
        base: an empty folder.
        settings: environment variables of all processes.
    """

    def __init__(self, base: Path, **settings: str):
        self.base = base
        self.mlflow_port, self.prefect_port = free_ports(2)
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        (base / "prefect").mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "FINETUNE_DATA_ROOT": str(base / "data"),
            "FINETUNE_LOCKS": str(base / "locks"),
            "PREFECT_HOME": str(base / "prefect"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "OMP_NUM_THREADS": "1",
            **settings,
        }

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    @property
    def database(self) -> Path:
        """MLflow's database, if no server was started."""
        return self.base / "data" / "mlflow" / "mlflow.db"

    def start_mlflow(self) -> None:
        """Start MLflow's server and let later runs use it."""
        self.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.mlflow_port}"
        self._start(
            "mlflow", [str(BIN / "mlflow"), "--env-file", str(ROOT / "mlflow" / "server.env"), "server"],
            MLFLOW_PORT=str(self.mlflow_port), MLFLOW_BACKEND_STORE_URI=f"sqlite:///{self.base}/mlflow.db",
            MLFLOW_ARTIFACTS_DESTINATION=str(self.base / "artifacts"),
        )  # fmt: skip
        self._wait_for_answer(f"http://127.0.0.1:{self.mlflow_port}/health")

    def start_prefect(self) -> None:
        """Start Prefect's server as `make up` does, with leases on disk, and let later runs use it."""
        self.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{self.prefect_port}/api"
        self._start(
            "prefect", [sys.executable, "-m", "ops.stack.host_check", "start"],
            PREFECT_SERVER_API_PORT=str(self.prefect_port), PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=FILE_LEASES,
            PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS="2",
        )  # fmt: skip
        self._wait_for_answer(f"{self.environment['PREFECT_API_URL']}/health")

    def _start(self, name: str, command: list[str], **settings: str) -> None:
        with (self.base / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.base, env=self.environment | settings, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _wait_for_answer(url: str) -> None:
        wait_for(url, lambda: urlopen(url, timeout=5).status == 200, 90)

    def kill(self, name: str) -> None:
        """kill -9 a server, or a run that was begun, with its process group."""
        process = self.processes.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def begin(self, parameters: dict[str, Any], **settings: str) -> subprocess.Popen[str]:
        """Start a run of the tiny model; its output is in a pipe."""
        self.processes["run"] = process = subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(SHORT | parameters)], cwd=self.base,
            env=self.environment | settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        return process

    def finish(self, process: subprocess.Popen[str], seconds: float = 300) -> str:
        """Wait for a run. Returns its output, which ends with its state and is kept in ``output.log``."""
        output, _ = process.communicate(timeout=seconds)
        with (self.base / "output.log").open("a") as log:
            log.write(output)
        return output

    def run(self, parameters: dict[str, Any], **settings: str) -> str:
        """Run the flow with a few parameters changed. Returns all that it printed."""
        return self.finish(self.begin(parameters, **settings))

    def journal(self) -> list[dict[str, Any]]:
        """The records of the one training that is there so far."""
        paths = list((self.base / "data" / "trainings").glob("*/metrics.jsonl"))
        lines = paths[0].read_text().splitlines(keepends=True) if paths else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def query(self, what: str) -> list[tuple[Any, ...]]:
        """An answer of Prefect's database."""
        with closing(sqlite3.connect(self.base / "prefect" / "prefect.db")) as connection:
            return connection.execute(what).fetchall()
