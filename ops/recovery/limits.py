"""The limit tag:gpu, which shows in Prefect who trains. The lock files, not the limit, decide who has a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from uuid import UUID

from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from ops.servers import TEMPORARY_SERVER_VARIABLE

POOL = "gpu"  # the work pool of all deployments
TAG = "gpu"  # of the tasks that the limit counts
LIMIT = f"tag:{TAG}"
LEASE_SECONDS = 75  # until a dead task's lease is freed: 60 s after its last renewal, and 15 s until the server looks


@dataclass(frozen=True)
class Slots:
    """The limit as the server counts it.

    Attributes:
        limit: number of tasks with the tag that may run at a time.
        active: number of slots counted as taken.
        holders: flow runs by the ids of the task runs that have a lease; None if the server no longer knows the run.
    """

    limit: int
    active: int
    holders: dict[UUID, FlowRun | None]

    @property
    def dead(self) -> list[FlowRun]:
        """Flow runs that have ended and whose lease is still there."""
        return [run for run in self.holders.values() if run and run.state and run.state.is_final()]

    @property
    def leaked(self) -> int:
        """Slots that count as taken without a lease: a killed server leaves them if it kept its leases in memory."""
        return max(0, self.active - len(self.holders))

    def describe(self) -> str:
        """Who has the slots, and when or how they become free, as a part of a sentence."""
        names = [f"{run.name} ({run.state_name})" if run else "an unknown run" for run in self.holders.values()]
        if self.leaked:
            names.append(f"{self.leaked} without a lease, as a killed server leaves them")
            remedy = "`make doctor ARGS=--fix` frees those without a lease, and so does a watcher"
        else:
            remedy = f"the slot of a run that died becomes free within {LEASE_SECONDS} s"
        by = ", ".join(names)
        return f"Prefect's limit {LIMIT} counts {self.active} of {self.limit} slots as taken, by {by}; {remedy}"


def is_temporary(client: SyncPrefectClient) -> bool:
    """Whether the server lives for one flow run only: that of `make run`, or one that Prefect's client started."""
    if client.server_type == ServerType.EPHEMERAL:
        return True
    return str(client.api_url).rstrip("/") == os.environ.get(TEMPORARY_SERVER_VARIABLE)


def read_slots(client: SyncPrefectClient) -> Slots | None:
    """The limit with the holders of its leases; None if the server has no such limit."""
    try:
        limit = client.read_global_concurrency_limit_by_name(LIMIT)
        tasks = client.read_concurrency_limit_by_tag(TAG).active_slots
    except ObjectNotFound:
        return None
    runs: dict[UUID, FlowRun] = {}
    flow_of: dict[UUID, UUID | None] = {}
    if tasks:
        for task in client.read_task_runs(task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=tasks))):
            flow_of[task.id] = task.flow_run_id
        ids = [run_id for run_id in flow_of.values() if run_id]
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids))):
            runs[run.id] = run
    holders = {task: runs.get(run_id) if (run_id := flow_of.get(task)) else None for task in tasks}
    return Slots(limit.limit, limit.active_slots, holders)


def ensure_limit(client: SyncPrefectClient, limit: int) -> bool:
    """Create the limit if it is missing: without it Prefect lets any number of tasks run, without a warning.

    A temporary server gets none: it does not free the lease of a task that died, and the next run would wait for
    ever. Returns whether the limit was created.
    """
    if is_temporary(client):
        return False
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
        return False
    except ObjectNotFound:
        pass
    try:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=limit))
    except ObjectAlreadyExists:  # another run has created it meanwhile
        return False
    return True


def set_limit(client: SyncPrefectClient, limit: int) -> None:
    """Change the number of tasks that may run at a time."""
    client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(limit=limit))


def set_active(client: SyncPrefectClient, active: int) -> None:
    """Set the number of slots counted as taken, as ``prefect gcl update tag:gpu --active-slots`` does."""
    client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(active_slots=active))


def release_all(client: SyncPrefectClient) -> None:
    """Revoke every lease and set the number of taken slots to zero."""
    client.reset_concurrency_limit_by_tag(TAG)  # revokes the leases and leaves the count as it is
    set_active(client, 0)
