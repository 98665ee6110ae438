"""The reaper: which runs are closed, with which status, and which are left alone."""

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
from ops.recovery.reaper import ATTEMPT_TAG, REASON_TAG, close_run, end_cancelled, reap, runs_of, stale_runs
from ops.settings import Settings
from ops.tracking.runs import PROCESS_TAG, RunRef, client, set_tags, tracked_run


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
    """opened(process, flow_run_id): a run that says RUNNING, as a process that was killed leaves it."""

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
    """What stale_runs looks at of a Prefect run."""
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
def test_prefect_s_end_is_mlflow_s(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str, status: str, crashed: bool
) -> None:
    """Whatever is known of the process, if it cannot be seen alive."""
    run = opened(dead if kind == "CRASHED" else None, "one")
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind))
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, status, crashed, False)


@pytest.mark.parametrize(
    ("kind", "closed"), [("CRASHED", False), ("CANCELLED", False), ("COMPLETED", True), ("FAILED", True)]
)
def test_who_was_given_up_and_lives_closes_its_own(
    opened: Callable[..., RunRef], settings: Settings, kind: str, closed: bool
) -> None:
    """Heartbeats can be lost; but a flow that has come to its end has nothing more to say, process or not."""
    opened(identify_process(), "one")
    assert bool(stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind))) == closed


@pytest.mark.parametrize("kind", ["RUNNING", "CANCELLING", None])
def test_a_dead_process_is_enough(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str | None
) -> None:
    """Where Prefect does not know yet, or never will."""
    run = opened(dead, "one")
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind) if kind else None)
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, "KILLED", True, kind is not None)


@pytest.mark.parametrize(
    ("kind", "run_count"), [("SCHEDULED", 1), ("PENDING", 1), ("RUNNING", 2), ("COMPLETED", 2), ("CANCELLING", 2)]
)
def test_a_retry_is_not_ended_for_the_attempt_before_it(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, kind: str, run_count: int
) -> None:
    """It has the same id in Prefect: the dead attempt's MLflow run is closed as killed, and no more than that."""
    run = opened(dead, "one")
    set_tags(run, {ATTEMPT_TAG: "1"})
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run(kind, run_count))
    assert (stale.run, stale.status, stale.crashed, stale.prefect_goes_on) == (run, "KILLED", False, False)


def test_what_may_live_is_left_alone(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity
) -> None:
    """A living process, one of another machine, and a run that says nothing about its process."""
    opened(identify_process(), "one")
    opened(replace(dead, machine="another"), "two")
    opened(None, "three")
    opened(identify_process())
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: None) == []
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("RUNNING")) == []


def test_an_empty_store_has_no_stale_runs(settings: Settings) -> None:
    """Before the first run there is not even an experiment."""
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: None) == []
    assert runs_of(settings.tracking_uri, "one") == []


def test_every_page_is_read(opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity) -> None:
    """More runs than MLflow gives at a time."""
    runs = {opened(dead).run_id for _ in range(5)}
    mlflow = client(settings.tracking_uri)
    search = mlflow.search_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mlflow.MlflowClient.search_runs",
            lambda self, *a, max_results=0, **k: search(*a, max_results=2, **k),
        )
        assert {stale.run.run_id for stale in stale_runs(settings.tracking_uri, lambda _: None)} == runs


def test_closing_says_why_and_only_once(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity
) -> None:
    """The reason stands in a tag; what has ended already keeps its status and says nothing."""
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


def test_reaping_twice_tells_once(
    opened: Callable[..., RunRef], settings: Settings, dead: ProcessIdentity, notices: list[tuple[Any, ...]]
) -> None:
    """People hear of a crash once, however many watchers look."""
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
    """What ran is Crashed, what was being cancelled Cancelled; an end is never changed."""
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


def test_a_cancellation_that_nobody_delivered(
    prefect_server: None, opened: Callable[..., RunRef], settings: Settings
) -> None:
    """The worker is gone: after a while the process is asked to end, and only then."""
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
def test_a_process_that_cannot_be_asked(
    error: type[OSError],
    said: list[str],
    opened: Callable[..., RunRef],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another user's is named, one that is gone is passed over; the round goes on to the next run."""
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
    """Of another server, or deleted: its process decides."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as prefect:
        opened(identify_process(), str(uuid4()))
        opened(identify_process(), "no id at all")
        assert reap(settings.tracking_uri, prefect) == []
        opened(dead, str(uuid4()))
        assert len(reap(settings.tracking_uri, prefect)) == 1


@pytest.mark.parametrize(("run_count", "notices"), [(1, 0), (2, 1)])
def test_a_retry_that_fails_is_told_of(
    opened: Callable[..., RunRef],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    dead: ProcessIdentity,
    run_count: int,
    notices: int,
) -> None:
    """Whoever reaped the attempt before it has told of that one only."""
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
    """Prefect's hooks have a moment to close the run and to tell of it; two notices would be one too many."""
    run = opened(dead, "one")
    assert stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("CRASHED"), grace_seconds=60) == []
    (stale,) = stale_runs(settings.tracking_uri, lambda flow_run_id: _flow_run("CRASHED"), grace_seconds=0)
    assert stale.run == run
