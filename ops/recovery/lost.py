"""Lost flow runs: their worker died before it began a process for them, or together with that process.

Prefect has no clean-up for them (prefect#18933, #20485). A lost run stays Pending for ever, or Running if it died
before its first heartbeat, and takes one of the places of the work pool. The reaper cannot see it, because it has no
MLflow run.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType

from ops.machine.process import FLOW_RUN_VARIABLE, find_process, tagged
from ops.notify import notify
from ops.recovery.limits import POOL
from ops.recovery.reaper import complete_flow_run, crash_flow_run, has_finished, runs_of

# A worker begins a process seconds after it made a run Pending. While the server is away it asks for up to a minute.
PENDING_SECONDS = 120.0
_WORKER_LABEL = "prefect.worker.name"


def lost_runs(prefect: SyncPrefectClient, pending_seconds: float = PENDING_SECONDS) -> dict[str, FlowRun]:
    """The flow runs of the pool that no process executes, by the reason.

    A run whose process may live on another machine, or belongs to another user, is not among them. A process that
    has just ended may be: its worker is about to report that. Look twice.

    Args:
        pending_seconds: after that a Pending run without process counts as lost.
    """
    unfinished = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    found = prefect.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished)),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )
    return {reason: run for run in found if (reason := _why_lost(run, pending_seconds))}


def _why_lost(run: FlowRun, pending_seconds: float) -> str | None:
    """Why a run is lost, with its name; None if it is not, or may not be."""
    # The worker writes the pid right after it has begun the process, and its name, which is the machine's, before.
    if run.infrastructure_pid:
        if run.labels.get(_WORKER_LABEL) != platform.node() or not run.infrastructure_pid.isdecimal():
            return None
        process = find_process(int(run.infrastructure_pid))
        # Another user's environment cannot be read, so that its process has no flow run here.
        if process and process.flow_run in (None, str(run.id)):
            return None
        return f"process {run.infrastructure_pid} of {run.name} is gone, and so is the worker that began it"
    if run.state is None or not run.state.is_pending() or tagged(FLOW_RUN_VARIABLE, str(run.id)):
        return None
    if (datetime.now(UTC) - run.state.timestamp).total_seconds() < pending_seconds:
        return None
    return f"no process was begun for {run.name}: its worker died"


def end_lost(prefect: SyncPrefectClient, tracking_uri: str, run: FlowRun, reason: str) -> bool:
    """Set a lost run to Crashed, or to Cancelled if it was being cancelled, and send a notice.

    One whose MLflow run is FINISHED is set to Completed.

    Returns:
        Whether Prefect accepted the state.
    """
    if any(has_finished(found, run) for found in runs_of(tracking_uri, str(run.id))):
        complete_flow_run(prefect, run.id)
        return True
    cancelled = run.state is not None and run.state.is_cancelling()
    if not crash_flow_run(prefect, str(run.id), reason):
        return False
    if not cancelled:
        notify(f"{run.name} crashed", [reason], {}, str(run.id))
    return True
