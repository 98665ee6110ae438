"""One truth about states: closes the MLflow runs, and ends the Prefect runs, of processes that are no more.

Whoever can, closes its own: the flow by ``tracked_run``, then Prefect's hooks. The reaper is for what both missed:
kill -9 of the flow and its worker, a reboot, MLflow gone at the wrong moment.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ops.machine.process import ProcessIdentity
from ops.notify import notify
from ops.tracking.runs import EXPERIMENT, PROCESS_TAG, RunRef, client, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun, State

FLOW_RUN_TAG = "prefect.flow_run_id"
ATTEMPT_TAG = "prefect.run_count"  # a run that is retried in Prefect keeps its id, and is an MLflow run each time
REASON_TAG = "ended_by"
_STATUS = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "CRASHED": "KILLED", "CANCELLED": "KILLED"}
HOOK_SECONDS = 15.0  # that Prefect's hooks take at most, on a busy machine too
_CANCEL_SECONDS = 60.0  # twice what Prefect's worker takes until it kills
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StaleRun:
    """An MLflow run that says RUNNING and is not.

    Attributes:
        run: in MLflow.
        name: for people.
        flow_run_id: its Prefect run; empty if it has none.
        status: what MLflow should say.
        reason: why, for people.
        prefect_goes_on: whether Prefect's run is still that of the dead process, and should end too.
        crashed: whether anybody should be told.
    """

    run: RunRef
    name: str
    flow_run_id: str
    status: str
    reason: str
    prefect_goes_on: bool
    crashed: bool


def mlflow_status(state: State | None) -> str | None:
    """MLflow's word for the end of a Prefect run; None while it has not ended."""
    return _STATUS.get(state.type.value) if state else None


def stale_runs(
    tracking_uri: str, flow_run: Callable[[str], FlowRun | None], grace_seconds: float = 0
) -> list[StaleRun]:
    """The runs of the experiment that say RUNNING although their flow run has ended, or their process.

    A run whose process may live on another machine, or in another container, is left alone. So is one that Prefect
    gave up while its process lives: heartbeats were lost, or it is about to end, and closes its run itself.

    Args:
        flow_run: a Prefect run by its id; None if there is none, or no server.
        grace_seconds: that Prefect's hooks are given to close what they can, and to tell of it.
    """
    found = []
    for run in _running(tracking_uri):
        tags = run.data.tags
        flow_run_id = tags.get(FLOW_RUN_TAG, "")
        prefect = flow_run(flow_run_id) if flow_run_id else None
        state = prefect.state if prefect else None
        again = prefect is not None and is_retried(run, prefect)
        status = None if again else mlflow_status(state)
        process = ProcessIdentity.from_json(tags.get(PROCESS_TAG, ""))
        given_up = status == "KILLED"
        if given_up and process and process.is_alive:
            continue
        if state and status:
            if (datetime.now(UTC) - state.timestamp).total_seconds() < grace_seconds:
                continue
            reason, crashed = f"Prefect: {state.name}", state.is_crashed()
        elif process and process.is_dead:
            status, reason, crashed = "KILLED", f"process {process.pid} on {process.host} is gone", not again
        else:
            continue
        ref = RunRef(tracking_uri, run.info.experiment_id, run.info.run_id)
        goes_on = state is not None and not again and not state.is_final()
        name = run.info.run_name or run.info.run_id
        found.append(StaleRun(ref, name, flow_run_id, status, reason, goes_on, crashed))
    return found


def is_retried(run: Run, prefect: FlowRun) -> bool:
    """Whether Prefect's run is no longer the attempt that an MLflow run is of: a later one, or about to be one."""
    about_to = prefect.state is not None and (prefect.state.is_scheduled() or prefect.state.is_pending())
    return about_to or run.data.tags.get(ATTEMPT_TAG, "") not in ("", str(prefect.run_count))


def close_run(run: RunRef, status: str, reason: str) -> bool:
    """Close a run that is still RUNNING, and write down why. Returns whether it was."""
    mlflow = client(run.tracking_uri)
    if mlflow.get_run(run.run_id).info.status != "RUNNING":
        return False
    mlflow.set_tag(run.run_id, REASON_TAG, reason)
    mlflow.set_terminated(run.run_id, status)
    return True


def runs_of(tracking_uri: str, flow_run_id: str) -> list[Run]:
    """The MLflow runs of a Prefect run, newest first; a run that Prefect retried has several."""
    if _is_absent(tracking_uri):
        return []
    mlflow = client(tracking_uri)
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    return list(mlflow.search_runs([experiment.experiment_id], f"tags.`{FLOW_RUN_TAG}` = '{flow_run_id}'"))


def reap(tracking_uri: str, prefect: SyncPrefectClient | None, grace_seconds: float = 0) -> list[str]:
    """Close every stale run, end its Prefect run where Prefect does not know yet, and tell people of crashes.

    Args:
        prefect: a client of a server; None if there is none, then dead processes alone count.
        grace_seconds: as in ``stale_runs``.

    Returns:
        A line for each run that was closed, or asked to end.
    """
    stale = stale_runs(tracking_uri, lambda flow_run_id: read_flow_run(prefect, flow_run_id), grace_seconds)
    lines = [
        f"MLflow run {run.name} was RUNNING: now {run.status} ({run.reason})"
        for run in stale
        if close_stale(run, prefect)
    ]
    return lines + (end_cancelled(tracking_uri, prefect) if prefect else [])


def end_cancelled(tracking_uri: str, prefect: SyncPrefectClient, seconds: float = _CANCEL_SECONDS) -> list[str]:
    """Ask processes of this machine to end (SIGTERM) whose cancellation nobody delivered: their worker is gone.

    Args:
        seconds: that a worker is given.

    Returns:
        A line for each, and for each that is another user's and cannot be asked.
    """
    lines = []
    for run in _running(tracking_uri):
        process = ProcessIdentity.from_json(run.data.tags.get(PROCESS_TAG, ""))
        found = read_flow_run(prefect, run.data.tags.get(FLOW_RUN_TAG, ""))
        if not (process and found and found.state and found.state.is_cancelling() and process.is_alive):
            continue
        if (datetime.now(UTC) - found.state.timestamp).total_seconds() > seconds:
            line = f"nobody cancelled {run.info.run_name}: its process {process.pid} "
            try:
                os.kill(process.pid, signal.SIGTERM)
                lines.append(line + "is asked to end")
            except PermissionError:
                lines.append(line + "is another user's, who must end it")
            except ProcessLookupError:  # it has just ended by itself
                pass
    return lines


def close_stale(stale: StaleRun, prefect: SyncPrefectClient | None) -> bool:
    """Do for one run what ``reap`` does for all. Returns whether it was still RUNNING."""
    if not close_run(stale.run, stale.status, stale.reason):
        return False
    if prefect is not None and stale.prefect_goes_on:
        crash_flow_run(prefect, stale.flow_run_id, stale.reason)
    if stale.crashed:
        links = {"MLflow run": stale.run.url}
        notify(f"{stale.name} crashed", [stale.reason], links, stale.flow_run_id or None)
    return True


def read_flow_run(prefect: SyncPrefectClient | None, flow_run_id: str) -> FlowRun | None:
    """A Prefect run; None if the server has none of that id, or there is no server."""
    from prefect.exceptions import ObjectNotFound

    if prefect is None:
        return None
    try:
        return prefect.read_flow_run(UUID(flow_run_id))
    except (ObjectNotFound, ValueError):
        return None


def crash_flow_run(prefect: SyncPrefectClient, flow_run_id: str, reason: str) -> bool:
    """Make a Prefect run whose process is gone Crashed. Returns whether Prefect agreed."""
    from prefect.client.schemas.responses import SetStateStatus
    from prefect.states import Cancelled, Crashed

    run = read_flow_run(prefect, flow_run_id)
    if run is None or run.state is None or run.state.is_final():
        return False
    # A cancellation that nobody was left to finish is one nonetheless.
    end = Cancelled if run.state.is_cancelling() else Crashed
    answer: OrchestrationResult[Any] = prefect.set_flow_run_state(run.id, end(message=reason))
    return answer.status == SetStateStatus.ACCEPT


def _is_absent(tracking_uri: str) -> bool:
    """Whether the store is a file that is not there yet; asking would create it."""
    return tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).exists()


def _running(tracking_uri: str) -> Iterator[Run]:
    if not _is_absent(tracking_uri):
        yield from search_runs(tracking_uri, "attributes.status = 'RUNNING'")
