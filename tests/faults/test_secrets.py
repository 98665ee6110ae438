"""Rows 34 and 41 of the table of faults: canary secrets appear in no output, log, state, database or artifact.

Real Prefect, with its temporary server, and a real MLflow server, which ignores the password that it is sent.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from made_up import BIN, FOREIGN, ROOT, free_ports, wait_for

pytestmark = pytest.mark.slow
PASSWORD, TOKEN, HOOK, KEY = (f"canary-{name}-8c1f2e77" for name in ("password", "token", "hook", "key"))
RUN = """
import json, sys
from flows.finetune import finetune
state = finetune(**json.loads(sys.argv[1]), return_state=True)
print(state.name, state.message)
"""
SHORT = {
    "model_size": "tiny", "dataset": "demo", "max_steps": 2, "sample_rows": 1, "pass_rows": 0, "eval_rows": 20,
    "max_new_tokens": 4, "device": "cpu", "batch_size": 4,
}  # fmt: skip


class World:
    """A data root, Prefect's home, and an MLflow server, all in one folder."""

    def __init__(self, base: Path, port: int):
        self.base = base
        self.port = port
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | {
            "PYTHONPATH": str(ROOT),
            "FINETUNE_DATA_ROOT": str(base / "data"),
            "FINETUNE_LOCKS": str(base / "locks"),
            "FINETUNE_WEBHOOK_URL": f"http://127.0.0.1:9/{HOOK}",
            "PREFECT_HOME": str(base / "prefect"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "HF_TOKEN": TOKEN,
            "HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9",
            "AWS_SECRET_ACCESS_KEY": KEY,
            "OMP_NUM_THREADS": "1",
        }

    def run(self, port: int, **parameters: Any) -> str:
        """Run the flow against an MLflow server whose address holds the password. Returns all that was printed."""
        environment = self.environment | {"MLFLOW_TRACKING_URI": f"http://me:{PASSWORD}@127.0.0.1:{port}"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(SHORT | parameters)], cwd=self.base, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        with (self.base / "output.log").open("a") as log:
            log.write(done.stdout)
        return done.stdout

    def query(self, what: str) -> list[tuple[Any, ...]]:
        """An answer of Prefect's database."""
        with closing(sqlite3.connect(self.base / "prefect" / "prefect.db")) as connection:
            return connection.execute(what).fetchall()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    (port,) = free_ports(1)
    made = World(tmp_path_factory.mktemp("world"), port)
    (made.base / "prefect").mkdir()
    with (made.base / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            [str(BIN / "mlflow"), "--env-file", str(ROOT / "mlflow" / "server.env"), "server"],
            cwd=made.base, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=made.environment | {
                "MLFLOW_PORT": str(port),
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{made.base}/mlflow.db",
                "MLFLOW_ARTIFACTS_DESTINATION": str(made.base / "artifacts"),
            },
        )  # fmt: skip
    try:
        wait_for("MLflow", lambda: urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200, 90)
        yield made
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _holding_a_canary(base: Path) -> list[tuple[Path, str]]:
    """Files below a folder that hold one of the canaries, as text or inside a database."""
    found = []
    for path in base.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [(path, canary) for canary in (PASSWORD, TOKEN, HOOK, KEY) if canary.encode() in content]
    return found


def test_a_right_server(world: World) -> None:
    """The run completes with the password in the address, and MLflow has the model."""
    output = world.run(world.port)
    assert "\nCompleted " in output, output[-3000:]
    assert list((world.base / "artifacts").rglob("model.safetensors"))
    assert len(world.query("select * from log")) > 5  # logs do reach the database that is searched
    assert _holding_a_canary(world.base) == []


def test_a_wrong_server(world: World) -> None:
    """The state's message names the server and not the password; a webhook that does not answer is not named."""
    output = world.run(9)
    assert "\nFailed " in output, output[-3000:]
    states = "select s.message from flow_run r join flow_run_state s on r.state_id = s.id where s.type = 'FAILED'"
    ((message,),) = world.query(states)
    assert "127.0.0.1" in message
    assert _holding_a_canary(world.base) == []


def test_a_hub_with_a_password_in_its_address(world: World) -> None:
    output = world.run(world.port, dataset="someone/rows")
    assert "Could not fetch the dataset someone/rows" in output, output[-3000:]
    assert _holding_a_canary(world.base) == []
