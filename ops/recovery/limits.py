"""The limit tag:gpu: what Prefect shows and counts of the GPU. The lock files decide; this displays."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

POOL = "gpu"  # the work pool of all deployments
TAG = "gpu"
LIMIT = f"tag:{TAG}"
LEASE_SECONDS = 75  # a dead holder's lease: 60 s after it was last renewed, and 15 s until the server looks


@dataclass(frozen=True)
class Slots:
    """The limit as the server counts it.

    Attributes:
        limit: tasks with the tag that run at a time.
        active: slots counted as taken.
        holders: task runs with a lease, each with its flow run, if the server still knows it.
    """

    limit: int
    active: int
    holders: dict[UUID, FlowRun | None]

    @property
    def dead(self) -> list[FlowRun]:
        """Holders whose flow run has ended: their lease was left behind."""
        return [run for run in self.holders.values() if run and run.state and run.state.is_final()]


def read_slots(client: SyncPrefectClient) -> Slots | None:
    """The limit and who holds it; None if the server has no such limit."""
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
    """Create the limit where it is missing: without it Prefect limits nothing, and says nothing.

    Not on a temporary server: there nobody collects the lease of a holder that died, and the next run would wait for
    ever. Returns whether it was created.
    """
    if client.server_type == ServerType.EPHEMERAL:
        return False
    try:
        client.read_global_concurrency_limit_by_name(LIMIT)
        return False
    except ObjectNotFound:
        pass
    try:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=limit))
    except ObjectAlreadyExists:  # another run was faster
        return False
    return True


def set_limit(client: SyncPrefectClient, limit: int) -> None:
    """Change the limit."""
    client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(limit=limit))


def set_active(client: SyncPrefectClient, active: int) -> None:
    """Correct the number of slots that count as taken, as ``prefect gcl update tag:gpu --active-slots`` does."""
    client.update_global_concurrency_limit(LIMIT, GlobalConcurrencyLimitUpdate(active_slots=active))


def release_all(client: SyncPrefectClient) -> None:
    """Forget every lease and count no slot as taken."""
    client.reset_concurrency_limit_by_tag(TAG)  # revokes the leases, and does not touch the count
    set_active(client, 0)
