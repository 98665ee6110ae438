"""The limit tag:gpu: who has its slots, and what frees them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import UUID

import pytest
from made_up import FOREIGN, ROOT, free_ports, wait_for

from ops.recovery.limits import LIMIT, ensure_limit, read_slots, set_active, set_limit

TAKE = """
from uuid import uuid4
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from ops.recovery.limits import LIMIT
with get_client(sync_client=True) as client:
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
    holder = ConcurrencyLeaseHolder(type="task_run", id=uuid4())
    client.increment_concurrency_slots_with_lease([LIMIT], 1, "concurrency", 60, holder=holder)
"""
WAIT = "from flows.waiting import _slots_taken; print(_slots_taken())"


def test_slots_with_a_lease_name_their_runs(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """Prefect frees the lease of a run that died."""
    assert read_slots(prefect) is None
    _limit(prefect, 2)
    run = prefect.read_flow_run(lease("Running"))
    slots = read_slots(prefect)
    assert slots
    assert slots.leaked == 0
    assert slots.describe() == (
        f"Prefect's limit {LIMIT} counts 1 of 2 slots as taken, by {run.name} (Running); the slot of a run that died "
        "becomes free within 75 s"
    )


def test_slots_without_a_lease_name_the_command(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """Nothing frees them after a time."""
    _limit(prefect, 4)
    run = prefect.read_flow_run(lease("Running"))
    set_active(prefect, 3)
    slots = read_slots(prefect)
    assert slots
    assert slots.leaked == 2
    assert (
        f"by {run.name} (Running), 2 without a lease, as a killed server leaves them; `make doctor"
        in slots.describe()
    )
    assert "within" not in slots.describe()


def _limit(prefect: Any, limit: int) -> None:
    ensure_limit(prefect, limit)
    set_limit(prefect, limit)


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None], dict[str, str]]]:
    """(start, kill, environment of clients) of ``prefect server start``, which keeps leases in memory."""
    (port,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow/mlflow.db",
        "FINETUNE_DATA_ROOT": str(tmp_path / "root"),
        "FINETUNE_LOCKS": str(tmp_path / "locks"),
        "FINETUNE_GPUS": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with (tmp_path / "log").open("ab") as log:
            running.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                )
            )
        wait_for("the server", lambda: urlopen(environment["PREFECT_API_URL"] + "/health", timeout=5), 120)

    def kill() -> None:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        running.clear()

    yield start, kill, environment
    kill()


@pytest.mark.slow
def test_a_killed_server_with_leases_in_memory(plain_server: Any) -> None:
    """A waiting run is told the command, the command frees the slot, and the run is told nothing any more."""
    start, kill, environment = plain_server

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout

    start()
    run("-c", TAKE)
    assert "1 without a lease" not in run("-c", WAIT)
    kill()
    start()
    told = run("-c", WAIT)
    print(told)
    assert (
        "the device is free, but Prefect's limit tag:gpu counts 1 of 1 slots as taken, by 1 without a lease" in told
    )
    assert "`make doctor ARGS=--fix` frees those without a lease" in told
    assert "[mended]" in run("-m", "ops.recovery.doctor", "--fix")
    assert run("-c", WAIT) == "None\n"
