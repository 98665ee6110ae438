"""The reaper: closes the MLflow runs and ends the Prefect runs of processes that have died.

A flow closes its own MLflow run (``tracked_run``), else Prefect's hooks do. The reaper closes those that both missed:
after kill -9 of the flow and its worker, a reboot, or an MLflow server that was down when the run ended.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ops.databases import is_absent
from ops.machine.process import ProcessIdentity
from ops.notify import notify
from ops.servers import EXPERIMENT
from ops.tracking.connection import client
from ops.tracking.runs import PARENT_TAG, PROCESS_TAG, REASON_TAG, RunRef, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun, State

FLOW_RUN_TAG = "prefect.flow_run_id"
ATTEMPT_TAG = "prefect.run_count"  # a retried Prefect run keeps its id, and each attempt is an MLflow run
_STATUS = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "CRASHED": "KILLED", "CANCELLED": "KILLED"}
HOOK_SECONDS = 15.0  # upper bound for the duration of Prefect's hooks on a busy machine
_CANCEL_SECONDS = 60.0  # twice the time after which Prefect's worker kills a cancelled run
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StaleRun:
    """An MLflow run with the status RUNNING whose flow run or process has ended.

    Attributes:
        run: the MLflow run.
        name: its name, or its id if it has none.
        flow_run_id: id of its Prefect run; empty if it has none.
        status: the status it should have in MLflow.
        reason: why, for people.
        prefect_goes_on: whether its Prefect run has not ended and should be set to Crashed or Cancelled.
        crashed: whether a notice should be sent.
    """

    run: RunRef
    name: str
    flow_run_id: str
    status: str
    reason: str
    prefect_goes_on: bool
    crashed: bool


def mlflow_status(state: State | None) -> str | None:
    """MLflow's status for the final state of a Prefect run; None for any other state."""
    return _STATUS.get(state.type.value) if state else None


def stale_runs(
    tracking_uri: str, flow_run: Callable[[str], FlowRun | None], grace_seconds: float = 0
) -> list[StaleRun]:
    """The runs of the experiment with the status RUNNING whose flow run or process has ended.

    A run is skipped if its process may live on another machine or in another container. It is also skipped if its
    process lives although Prefect set the flow run to Crashed or Cancelled: either heartbeats were lost, or the
    process is about to end and will close its run itself.

    Args:
        flow_run: reads a Prefect run by its id; None if the run does not exist or there is no server.
        grace_seconds: time after the end of a flow run for Prefect's hooks to close the run and notify.
    """
    found = []
    for run in _running(tracking_uri):
        tags = run.data.tags
        flow_run_id = tags.get(FLOW_RUN_TAG, "")
        prefect = flow_run(flow_run_id) if flow_run_id else None
        state = prefect.state if prefect else None
        retried = prefect is not None and is_retried(run, prefect)
        status = None if retried else mlflow_status(state)
        process = ProcessIdentity.from_json(tags.get(PROCESS_TAG, ""))
        if status == "KILLED" and process and process.is_alive:
            continue
        if state and status:
            if (datetime.now(UTC) - state.timestamp).total_seconds() < grace_seconds:
                continue
            reason, crashed = f"Prefect: {state.name}", state.is_crashed()
        elif process and process.is_dead:
            status, reason, crashed = "KILLED", f"process {process.pid} on {process.host} is gone", not retried
        else:
            continue
        ref = RunRef(tracking_uri, run.info.experiment_id, run.info.run_id)
        if PARENT_TAG in tags:  # a trial: the sweep's own run speaks for the flow run
            state, crashed = None, False
        goes_on = state is not None and not retried and not state.is_final()
        name = run.info.run_name or run.info.run_id
        found.append(StaleRun(ref, name, flow_run_id, status, reason, goes_on, crashed))
    return found


def is_retried(run: Run, prefect: FlowRun) -> bool:
    """Whether the Prefect run is at a later attempt than the MLflow run, or is about to start one."""
    about_to_start = prefect.state is not None and (prefect.state.is_scheduled() or prefect.state.is_pending())
    return about_to_start or run.data.tags.get(ATTEMPT_TAG, "") not in ("", str(prefect.run_count))


def close_run(run: RunRef, status: str, reason: str) -> bool:
    """Close a run that is still RUNNING, with the reason as a tag. Returns whether it was still RUNNING."""
    mlflow = client(run.tracking_uri)
    if mlflow.get_run(run.run_id).info.status != "RUNNING":
        return False
    mlflow.set_tag(run.run_id, REASON_TAG, reason)
    mlflow.set_terminated(run.run_id, status)
    return True


def runs_of(tracking_uri: str, flow_run_id: str) -> list[Run]:
    """The MLflow runs of a Prefect run: those of its attempts, newest first, then those of a sweep's trials."""
    if is_absent(tracking_uri):
        return []
    mlflow = client(tracking_uri)
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    found = mlflow.search_runs([experiment.experiment_id], f"tags.`{FLOW_RUN_TAG}` = '{flow_run_id}'")
    return sorted(found, key=lambda run: PARENT_TAG in run.data.tags)


def reap(tracking_uri: str, prefect: SyncPrefectClient | None, grace_seconds: float = 0) -> list[str]:
    """Close every stale run, end its Prefect run if that has not ended, and send a notice of each crash.

    Args:
        prefect: a client of Prefect's server; None without one: then only runs of dead processes are closed.
        grace_seconds: as in ``stale_runs``.

    Returns:
        A line for each run that was closed or whose process was asked to end.
    """
    stale = stale_runs(tracking_uri, lambda flow_run_id: read_flow_run(prefect, flow_run_id), grace_seconds)
    lines = [
        f"MLflow run {run.name} was RUNNING: now {run.status} ({run.reason})"
        for run in stale
        if close_stale(run, prefect)
    ]
    return lines + (end_cancelled(tracking_uri, prefect) if prefect else [])


def end_cancelled(tracking_uri: str, prefect: SyncPrefectClient, seconds: float = _CANCEL_SECONDS) -> list[str]:
    """Send SIGTERM to processes of this machine whose flow run was cancelled and whose worker has died.

    Prefect's worker delivers a cancellation; without it the process would go on.

    Args:
        seconds: time for a worker to deliver the cancellation.

    Returns:
        A line for each such process, also for one of another user, which cannot be signalled.
    """
    lines = []
    for run in _running(tracking_uri):
        process = ProcessIdentity.from_json(run.data.tags.get(PROCESS_TAG, ""))
        found = read_flow_run(prefect, run.data.tags.get(FLOW_RUN_TAG, ""))
        if not (process and found and found.state and found.state.is_cancelling() and process.is_alive):
            continue
        if PARENT_TAG in run.data.tags:  # its process gets the signal for the sweep's own run
            continue
        if (datetime.now(UTC) - found.state.timestamp).total_seconds() > seconds:
            line = f"no worker delivered the cancellation of {run.info.run_name}: its process {process.pid} "
            try:
                os.kill(process.pid, signal.SIGTERM)
                lines.append(line + "is asked to end")
            except PermissionError:
                lines.append(line + "is another user's, who must end it")
            except ProcessLookupError:  # it has ended meanwhile
                pass
    return lines


def close_stale(stale: StaleRun, prefect: SyncPrefectClient | None) -> bool:
    """Close one stale run as ``reap`` does. Returns whether it was still RUNNING."""
    if not close_run(stale.run, stale.status, stale.reason):
        return False
    if prefect is not None and stale.prefect_goes_on:
        crash_flow_run(prefect, stale.flow_run_id, stale.reason)
    if stale.crashed:
        links = {"MLflow run": stale.run.url}
        notify(f"{stale.name} crashed", [stale.reason], links, stale.flow_run_id or None)
    return True


def read_flow_run(prefect: SyncPrefectClient | None, flow_run_id: str) -> FlowRun | None:
    """Read a Prefect run; None if the server does not know the id, or there is no server."""
    from prefect.exceptions import ObjectNotFound

    if prefect is None:
        return None
    try:
        return prefect.read_flow_run(UUID(flow_run_id))
    except (ObjectNotFound, ValueError):
        return None


def crash_flow_run(prefect: SyncPrefectClient, flow_run_id: str, reason: str) -> bool:
    """Set a Prefect run whose process has died to Crashed, or to Cancelled if it was being cancelled.

    Returns whether Prefect accepted the state.
    """
    from prefect.client.schemas.responses import SetStateStatus
    from prefect.states import Cancelled, Crashed

    run = read_flow_run(prefect, flow_run_id)
    if run is None or run.state is None or run.state.is_final():
        return False
    end = Cancelled if run.state.is_cancelling() else Crashed
    answer: OrchestrationResult[Any] = prefect.set_flow_run_state(run.id, end(message=reason))
    return answer.status == SetStateStatus.ACCEPT


def has_finished(run: Run, prefect: FlowRun) -> bool:
    """Whether an MLflow run of the present attempt of a Prefect run is FINISHED: then all its work is done.

    The run of a trial beneath a sweep's says nothing of the kind.
    """
    return run.info.status == "FINISHED" and PARENT_TAG not in run.data.tags and not is_retried(run, prefect)


def complete_flow_run(prefect: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Set a Prefect run to Completed whose process died in the moment after it had finished its MLflow run."""
    from prefect.states import Completed

    state: State[Any] = Completed(message="the process died when everything was done and logged")
    prefect.set_flow_run_state(flow_run_id, state, force=True)


def _running(tracking_uri: str) -> Iterator[Run]:
    if not is_absent(tracking_uri):
        yield from search_runs(tracking_uri, "attributes.status = 'RUNNING'")
