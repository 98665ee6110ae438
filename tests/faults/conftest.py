"""An installation with servers, worker and watcher for each module, and runs submitted to it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.error import HTTPError

import pytest
from faulty import Run, Webhook
from installation import Installation, installed
from made_up import wait_for

from ops.recovery.zombies import HEARTBEAT_SECONDS


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    server = Webhook()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, webhook: Webhook) -> Iterator[Installation]:
    settings = {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "FINETUNE_WEBHOOK_URL": f"http://127.0.0.1:{webhook.server_port}/s3cr3t-path",
        "OMP_NUM_THREADS": "1",
    }
    with installed(tmp_path_factory.mktemp("platform"), **settings) as started:
        automation = (
            "from ops.recovery.zombies import ensure_zombie_automation as f; assert not f()"  # `make deploy` did
        )
        done = started.command(sys.executable, "-c", automation)
        output, _ = done.communicate(timeout=60)
        assert done.returncode == 0, output
        started.start_watcher()
        yield started


@pytest.fixture
def submit(platform: Installation) -> Iterator[Callable[..., Run]]:
    """submit(parameters, deployment="tiny"): a run of the tiny model on the CPU, ended with the test."""
    ids = {deployment["name"]: deployment["id"] for deployment in platform.api("/deployments/filter", {})}
    tiny = next(d["parameters"] for d in platform.api("/deployments/filter", {}) if d["name"] == "tiny")
    started: list[Run] = []

    def start(parameters: dict[str, Any], deployment: str = "tiny") -> Run:
        body = {"parameters": {**tiny, **parameters}, "state": {"type": "SCHEDULED"}}
        made = wait_for("a run", lambda: platform.api(f"/deployments/{ids[deployment]}/create_flow_run", body), 30)
        started.append(Run(platform, made["id"]))
        return started[-1]

    yield start
    open_runs = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    for run in [*started, *(Run(platform, made["id"]) for made in platform.api("/flow_runs/filter", open_runs))]:
        for pid in platform.descendants("PREFECT__FLOW_RUN_ID", run.id):
            os.kill(pid, signal.SIGKILL)
        wait_for("the end", lambda run=run: _is_over(run), 120)


def _is_over(run: Run) -> bool:
    """Whether it has a final state, or was deleted."""
    try:
        return run.state["type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    except HTTPError as error:
        return error.code == 404
