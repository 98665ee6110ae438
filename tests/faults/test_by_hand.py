"""What people do by hand to a run: an unknown parameter, a state that is set, a run that is deleted."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable

import pytest
from faulty import LONG, SHORT, Run
from installation import Installation
from made_up import wait_for

pytestmark = pytest.mark.slow


def test_an_unknown_parameter_is_named(platform: Installation, submit: Callable[..., Run]) -> None:
    """In the state's message, by Prefect's API, which lets it pass."""
    run = submit({**SHORT, "epoch": 3})
    state = run.wait_for_state("Failed", 60)
    assert state["message"] == "no parameter is called epoch: did you mean epochs?"


def _log_of(platform: Installation, run: Run) -> str:
    logs = platform.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [run.id]}}, "limit": 200})
    return "\n".join(line["message"] for line in logs)


def test_a_run_that_is_set_to_completed_says_that_it_goes_on(
    platform: Installation, submit: Callable[..., Run]
) -> None:
    """The training is not lost; the log has the command that ends it."""
    run = submit({**LONG, "seed": 200})
    run.wait_until_it_trains()
    pid = run.process.pid
    body = {"state": {"type": "COMPLETED", "name": "Completed"}, "force": True}
    platform.api(f"/flow_runs/{run.id}/set_state", body)
    expected = f"for Prefect this run is Completed, but its training goes on: `kill {pid}` ends it"
    wait_for("the warning", lambda: expected in _log_of(platform, run), 30)
    assert not run.process.is_dead
    platform.api(f"/flow_runs/{run.id}/set_state", {"state": {"type": "RUNNING"}, "force": True})


def test_a_run_that_is_deleted_says_that_it_goes_on(platform: Installation, submit: Callable[..., Run]) -> None:
    """Its log lines stay on Prefect's server."""
    run = submit({**LONG, "seed": 201})
    run.wait_until_it_trains()
    process = run.process
    url = f"{platform.environment['PREFECT_API_URL']}/flow_runs/{run.id}"
    kept = json.loads(urllib.request.urlopen(url).read())
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE"))
    wait_for("the warning", lambda: "for Prefect this run is deleted" in _log_of(platform, run), 30)
    assert not process.is_dead
    assert kept["id"] == run.id
