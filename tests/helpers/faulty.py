"""Flow runs in an installation, as Prefect and MLflow see them, and a webhook that keeps the notices."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from installation import Installation
from made_up import wait_for

from ops.machine.process import ProcessIdentity
from ops.tracking.connection import client

SHORT = {"max_steps": 30, "eval_freq": 20, "sample_rows": 1, "pass_rows": 0, "max_new_tokens": 4, "batch_size": 8}
LONG = {**SHORT, "epochs": 1000, "max_steps": 1_000_000, "eval_freq": 1_000_000}


@dataclass(frozen=True)
class Run:
    """A flow run, in Prefect and in MLflow."""

    on: Installation
    id: str

    @property
    def prefect(self) -> dict[str, Any]:
        return dict(self.on.api(f"/flow_runs/{self.id}"))

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.prefect["state"])

    @property
    def mlflow(self) -> Any:
        """Its MLflow run; None if there is none yet."""
        mlflow = client(self.on.tracking)
        experiment = mlflow.get_experiment_by_name("finetune")
        if experiment is None:
            return None
        found = mlflow.search_runs([experiment.experiment_id], f"tags.`prefect.flow_run_id` = '{self.id}'")
        assert len(found) <= 1
        return found[0] if found else None

    @property
    def both(self) -> tuple[str, str]:
        """State type in Prefect, status in MLflow."""
        return self.state["type"], self.mlflow.info.status

    @property
    def process(self) -> ProcessIdentity:
        identity = ProcessIdentity.from_json(self.mlflow.data.tags["process"])
        assert identity is not None
        return identity

    @property
    def losses(self) -> list[Any]:
        """The points of train/loss that MLflow has."""
        return list(client(self.on.tracking).get_metric_history(self.mlflow.info.run_id, "train/loss"))

    @property
    def logs(self) -> str:
        query = {"logs": {"flow_run_id": {"any_": [self.id]}}, "limit": 200, "sort": "TIMESTAMP_DESC"}
        return "\n".join(line["message"] for line in self.on.api("/logs/filter", query))

    def artifact(self, key: str) -> str:
        """The run's newest artifact with that key; empty if it has none."""
        query = {"artifacts": {"flow_run_id": {"any_": [self.id]}, "key": {"any_": [key]}}}
        found = self.on.api("/artifacts/filter", query)
        return str(found[-1]["data"]) if found else ""

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Send a signal to its process alone. Returns the time of day in seconds."""
        os.kill(self.process.pid, number)
        return time.time()

    def wait_until_it_trains(self) -> None:
        wait_for("a trained step", lambda: self.mlflow and "train/loss" in self.mlflow.data.metrics, 120)

    def wait_for_state(self, name: str, seconds: float) -> dict[str, Any]:
        return dict(wait_for(f"{name} of {self.id}", lambda: (s := self.state)["name"] == name and s, seconds))

    def wait_for_both(self, prefect: str, mlflow: str, seconds: float) -> None:
        wait_for(f"{prefect} and {mlflow}", lambda: self.mlflow and self.both == (prefect, mlflow), seconds)


class Webhook(ThreadingHTTPServer):
    """A webhook that keeps the texts of notices."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        self.server.texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        return
