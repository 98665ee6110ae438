"""The reaper: which runs are closed, with which status, and which stay open."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.finetune import finetune
from flows.hooks import after_failure
from ops.machine.process import ProcessIdentity, identify_process
from ops.recovery import reaper
from ops.recovery.reaper import ATTEMPT_TAG, close_run, end_cancelled, reap, runs_of, stale_runs
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.runs import PARENT_TAG, PROCESS_TAG, REASON_TAG, RunRef, set_tags, tracked_run


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path) -> Settings:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(mlflow_database, tmp_path / "mlflow" / "mlflow.db")
    return Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")


@pytest.fixture(scope="session")
def dead() -> ProcessIdentity:
    """The identity of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify_process(process.pid)
    process.communicate(b"\n")
    return identity


@pytest.fixture
def opened(settings: Settings) -> Callable[..., RunRef]:
    """opened(process, flow_run_id): a run with the status RUNNING, as left by a killed process."""

    def start(process: ProcessIdentity | None, flow_run_id: str = "") -> RunRef:
        with tracked_run(settings, "a run", {}, {"prefect.flow_run_id": flow_run_id}) as run:
            pass
        mlflow = client(run.tracking_uri)
        mlflow.update_run(run.run_id, status="RUNNING")
        if process is None:
            mlflow.delete_tag(run.run_id, PROCESS_TAG)
        else:
            set_tags(run, {PROCESS_TAG: process.to_json()})
        return run

    return start


def _flow_run(kind: str, run_count: int = 1) -> Any:
    """The attributes of a Prefect run that stale_runs reads."""
    return SimpleNamespace(state=State(type=StateType(kind), name=kind.title()), run_count=run_count)


@pytest.mark.parametrize(
    ("kind", "status", "crashed"),
    [
        ("COMPLETED", "FINISHED", False),
        ("FAILED", "FAILED", False),
        ("CRASHED", "KILLED", True),
        ("CANCELLED", "KILLED", False),
    ],
)
def test_the_final_state_in_prefect_gives_the_status_in_mlflow(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str, status: str, crashed: bool
) -> None:
    """Unless the process is known to live."""
    run = opened(dead if kind == "CRASHED" else None, "one")
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind))
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, status, crashed, False)


@pytest.mark.parametrize(
    ("kind", "closed"), [("CRASHED", False), ("CANCELLED", False), ("COMPLETED", True), ("FAILED", True)]
)
def test_a_living_process_closes_its_own_run(
    opened: Callable[..., RunRef], settings: Settings, kind: str, closed: bool
) -> None:
    """Crashed may mean lost heartbeats. A flow that completed or failed has ended, even if its process lives."""
    opened(identify_process(), "one")
    assert bool(stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind))) == closed


@pytest.mark.parametrize("kind", ["RUNNING", "CANCELLING", None])
def test_a_dead_process_is_enough(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str | None
) -> None:
    """Before Prefect has noticed, and for a run that Prefect does not know."""
    run = opened(dead, "one")
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind) if kind else None)
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, "KILLED", True, kind is not None)


@pytest.mark.parametrize("kind", ["RUNNING", "CANCELLING"])
def test_a_trial_of_a_sweep_is_closed_and_says_nothing_about_the_flow_run(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str
) -> None:
    """A helper may have died while the sweep goes on; a crash of the sweep is one notice, by its own run."""
    run = opened(dead, "one")
    set_tags(run, {PARENT_TAG: "of a sweep"})
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind))
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, "KILLED", False, False)


def test_the_run_of_a_sweep_comes_before_those_of_its_trials(
    opened: Callable[..., RunRef], settings: Settings
) -> None:
    """Though they are newer: a notice links to the first."""
    sweep, trial = opened(identify_process(), "one"), opened(identify_process(), "one")
    assert [run.info.run_id for run in runs_of(settings.tracking_uri, "one")] == [trial.run_id, sweep.run_id]
    set_tags(trial, {PARENT_TAG: sweep.run_id})
    assert [run.info.run_id for run in runs_of(settings.tracking_uri, "one")] == [sweep.run_id, trial.run_id]


@pytest.mark.parametrize(
    ("kind", "run_count"), [("SCHEDULED", 1), ("PENDING", 1), ("RUNNING", 2), ("COMPLETED", 2), ("CANCELLING", 2)]
)
def test_a_retry_is_not_ended_for_the_attempt_before_it(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str, run_count: int
) -> None:
    """Both attempts have one id in Prefect: only the MLflow run of the dead attempt is closed, without a notice."""
    run = opened(dead, "one")
    set_tags(run, {ATTEMPT_TAG: "1"})
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind, run_count))
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, "KILLED", False, False)


def test_runs_whose_process_may_live_stay_open(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity
) -> None:
    """A living process, a process of another machine, and a run without a tag for its process."""
    opened(identify_process(), "one")
    opened(replace(dead, machine="another"), "two")
    opened(None, "three")
    opened(identify_process())
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: None) == []
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("RUNNING")) == []


def test_an_empty_store_has_no_stale_runs(settings: Settings) -> None:
    """Before the first run there is no experiment."""
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: None) == []
    assert runs_of(settings.tracking_uri, "one") == []


def test_every_page_is_read(opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity) -> None:
    """More runs than one page of MLflow's search."""
    runs = {opened(dead).run_id for _ in range(5)}
    mlflow = client(settings.tracking_uri)
    search = mlflow.search_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlflow.MlflowClient.search_runs",
            lambda self, *a, max_results=0, **k: search(*a, max_results=2, **k),
        )
        assert {stale.run.run_id for stale in stale_runs(settings.tracking_uri, lambda _: None)} == runs


def test_a_run_is_closed_once_with_its_reason(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity
) -> None:
    """The reason is a tag; a run that has ended already keeps its status and reason."""
    run = opened(dead)
    assert close_run(run, "KILLED", "a reason")
    assert not close_run(run, "FAILED", "another")
    closed = client(run.tracking_uri).get_run(run.run_id)
    assert (closed.info.status, closed.data.tags[REASON_TAG]) == ("KILLED", "a reason")
    assert closed.info.end_time


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reaper, "notify", lambda *arguments: told.append(arguments))
    return told


def test_reaping_twice_sends_one_notice(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, notices: list[tuple[Any, ...]]
) -> None:
    """One notice for each crash, however many watchers run."""
    run = opened(dead)
    (line,) = reap(settings.tracking_uri, None)
    assert "KILLED" in line
    assert str(dead.pid) in line
    assert reap(settings.tracking_uri, None) == []
    assert client(run.tracking_uri).get_run(run.run_id).info.status == "KILLED"
    assert len(notices) == 1
    assert "crashed" in notices[0][0]


@pytest.mark.parametrize(
    ("before", "after"),
    [("Running", "CRASHED"), ("Cancelling", "CANCELLED"), ("Completed", "COMPLETED"), ("Failed", "FAILED")],
)
def test_prefect_learns_of_a_dead_process(
    prefect_server: None,
    opened: Callable[..., RunRef],
    settings: Settings,
    dead: ProcessIdentity,
    notices: list[tuple[Any, ...]],
    before: str,
    after: str,
) -> None:
    """A running flow run becomes Crashed, a cancelling one Cancelled; a final state is not changed."""
    from prefect import flow, states
    from prefect.client.orchestration import get_client

    @flow
    def nothing() -> None:
        return

    with get_client(sync_client=True) as prefect:
        flow_run = prefect.create_flow_run(nothing, state=states.Running())
        if before != "Running":
            prefect.set_flow_run_state(flow_run.id, getattr(states, before)(), force=True)
        run = opened(dead, str(flow_run.id))
        assert len(reap(settings.tracking_uri, prefect)) == 1
        found = prefect.read_flow_run(flow_run.id)
        assert found.state is not None
        assert found.state.type.value == after
        if after == "CRASHED":
            assert str(dead.pid) in str(found.state.message)
    status = {"COMPLETED": "FINISHED", "FAILED": "FAILED"}.get(after, "KILLED")
    assert client(run.tracking_uri).get_run(run.run_id).info.status == status


def test_a_cancellation_without_a_worker(
    prefect_server: None, opened: Callable[..., RunRef], settings: Settings
) -> None:
    """The worker has died: the process gets SIGTERM, but only after the time that a worker has."""
    from prefect import flow, states
    from prefect.client.orchestration import get_client

    @flow
    def nothing() -> None:
        return

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with get_client(sync_client=True) as prefect:
            flow_run = prefect.create_flow_run(nothing, state=states.Running())
            opened(identify_process(process.pid), str(flow_run.id))
            assert end_cancelled(settings.tracking_uri, prefect, 0) == []
            prefect.set_flow_run_state(flow_run.id, states.Cancelling())
            assert reap(settings.tracking_uri, prefect) == []
            assert process.poll() is None
            (line,) = end_cancelled(settings.tracking_uri, prefect, 0)
            assert str(process.pid) in line
            assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("error", "said"), [(PermissionError, ["another user's"]), (ProcessLookupError, [])])
def test_a_process_that_cannot_be_signalled(
    error: type[OSError],
    said: list[str],
    opened: Callable[..., RunRef],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process of another user gives a line, an ended one does not; the next run is treated in both cases."""
    state = SimpleNamespace(is_cancelling=lambda: True, timestamp=datetime.now(UTC))
    monkeypatch.setattr(reaper, "read_flow_run", lambda prefect, flow_run_id: SimpleNamespace(state=state))
    asked: list[int] = []

    def refuse(pid: int, number: int) -> None:
        asked.append(pid)
        raise error

    monkeypatch.setattr("ops.recovery.reaper.os.kill", refuse)
    opened(identify_process(), str(uuid4()))
    opened(identify_process(), str(uuid4()))
    lines = end_cancelled(settings.tracking_uri, None, 0)  # type: ignore[arg-type]
    assert asked == [os.getpid()] * 2
    assert len(lines) == 2 * len(said)
    assert all(f"{os.getpid()} is {text}" in line for line in lines for text in said)


def test_a_run_that_prefect_does_not_know(
    prefect_server: None, opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity
) -> None:
    """It belongs to another server or was deleted: only its process counts."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as prefect:
        opened(identify_process(), str(uuid4()))
        opened(identify_process(), "no id at all")
        assert reap(settings.tracking_uri, prefect) == []
        opened(dead, str(uuid4()))
        assert len(reap(settings.tracking_uri, prefect)) == 1


@pytest.mark.parametrize(("run_count", "notices"), [(1, 0), (2, 1)])
def test_a_retry_that_fails_sends_a_notice(
    opened: Callable[..., RunRef],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    dead: ProcessIdentity,
    run_count: int,
    notices: int,
) -> None:
    """The notice of the reaped first attempt does not replace that of the retry."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(settings.data_root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    told: list[Any] = []
    monkeypatch.setattr("flows.hooks.notify", lambda *notice: told.append(notice))
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), name="a run", run_count=run_count)
    run = opened(dead, str(flow_run.id))
    set_tags(run, {ATTEMPT_TAG: "1"})
    close_run(run, "KILLED", "its process is gone")
    after_failure(finetune, flow_run, State(type=StateType.FAILED, name="Failed", message="an exception"))
    assert len(told) == notices


def test_hooks_come_first(opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity) -> None:
    """Prefect's hooks have time to close the run and to send the notice, so that there is only one."""
    run = opened(dead, "one")
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("CRASHED"), grace_seconds=60) == []
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("CRASHED"), grace_seconds=0)
    assert stale.run == run
