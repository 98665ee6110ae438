"""Flow runs without a process: found on a real server, ended at the second look, and no other run with them."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from ops.recovery.limits import POOL, ensure_limit
from ops.recovery.lost import end_lost, lost_runs
from ops.recovery.reaper import ATTEMPT_TAG, FLOW_RUN_TAG
from ops.recovery.watch import Watcher
from ops.settings import Settings
from ops.tracking.runs import tracked_run


@pytest.fixture
def submitted(prefect: Any) -> Iterator[Callable[..., Any]]:
    """submitted(state, pid=None, worker=...): a flow run as a worker of the pool left it."""
    from prefect import flow, states
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with suppress(ObjectAlreadyExists):
        prefect.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    made: list[Any] = []

    @flow
    def some_flow() -> None:
        return

    def submit(state: str, pid: int | None = None, worker: str | None = None) -> Any:
        run = prefect.create_flow_run(some_flow, state=getattr(states, state)(), work_pool_name=POOL)
        prefect.update_flow_run_labels(run.id, {"prefect.worker.name": worker or platform.node()})
        if pid:
            prefect.update_flow_run(run.id, infrastructure_pid=str(pid))
        made.append(run.id)
        return run.id

    yield submit
    for run_id in made:
        prefect.delete_flow_run(run_id)


def _dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def _lost(prefect: Any, seconds: float = 3600.0) -> set[Any]:
    return {run.id for run in lost_runs(prefect, seconds).values()}


@pytest.mark.parametrize("state", ["Pending", "Running", "Cancelling"])
def test_a_run_whose_process_is_gone(prefect: Any, submitted: Callable[..., Any], state: str) -> None:
    """Whatever it was doing, on this machine only."""
    gone = submitted(state, _dead())
    submitted(state, _dead(), worker="another")
    submitted(state, os.getpid())
    assert _lost(prefect) == {gone}


def test_a_run_that_no_process_was_begun_for(prefect: Any, submitted: Callable[..., Any]) -> None:
    """After the time that a worker may need, whichever machine the worker was on; never without a state Pending."""
    run = submitted("Pending", worker="another")
    submitted("Running")
    submitted("Scheduled")
    assert _lost(prefect) == set()
    assert _lost(prefect, 0.0) == {run}


def test_a_process_that_the_worker_has_not_reported_yet(
    prefect: Any, submitted: Callable[..., Any], sleeper: Callable[..., Any]
) -> None:
    """It lives, and has the run in its environment."""
    sleeper(PREFECT__FLOW_RUN_ID=str(submitted("Pending")))
    assert _lost(prefect, 0.0) == set()


def test_another_process_has_the_pid_now(
    prefect: Any, submitted: Callable[..., Any], sleeper: Callable[..., Any]
) -> None:
    """One of another flow run."""
    other = sleeper(PREFECT__FLOW_RUN_ID="another")
    run = submitted("Running", other.pid)
    assert _lost(prefect) == {run}


@pytest.mark.parametrize(("state", "end", "notices"), [("Pending", "CRASHED", 1), ("Cancelling", "CANCELLED", 0)])
def test_the_watcher_ends_it_at_the_second_check(
    prefect: Any,
    settings: Settings,
    submitted: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    end: str,
    notices: int,
) -> None:
    """A worker that lives reports the end of a process itself, a moment later."""
    sent: list[Any] = []
    monkeypatch.setattr("ops.recovery.lost.notify", lambda *arguments: sent.append(arguments))
    ensure_limit(prefect, 1)
    run = submitted(state, _dead())
    watcher = Watcher(settings, 1)
    assert watcher.check() == []
    assert prefect.read_flow_run(run).state.type.value == state.upper()
    (line,) = watcher.check()
    assert "is gone" in line
    assert prefect.read_flow_run(run).state.type.value == end
    assert len(sent) == notices
    assert watcher.check() == []
    assert not end_lost(prefect, settings.tracking_uri, prefect.read_flow_run(run), "again")


def test_one_that_died_when_everything_was_logged(
    prefect: Any, settings: Settings, submitted: Callable[..., Any]
) -> None:
    """It is Completed, as its MLflow run is FINISHED."""
    run = submitted("Running", _dead())
    with tracked_run(settings, "a run", {}, {FLOW_RUN_TAG: str(run), ATTEMPT_TAG: "1"}):
        pass
    assert end_lost(prefect, settings.tracking_uri, prefect.read_flow_run(run), "gone")
    assert prefect.read_flow_run(run).state.type.value == "COMPLETED"
