from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ops.recovery.limits import LIMIT
from ops.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(mlflow_database, tmp_path / "mlflow" / "mlflow.db")
    monkeypatch.setenv("FINETUNE_LOCKS", str(tmp_path / "device-locks"))
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    monkeypatch.setattr("ops.recovery.reaper.notify", lambda *arguments: None)
    return Settings.load()


@pytest.fixture
def prefect(prefect_server: None) -> Iterator[Any]:
    """A client of a server with no limit tag:gpu; none is left for the flows of other tests either."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as prefect:
        for step in range(2):
            with contextlib.suppress(ObjectNotFound):
                prefect.delete_global_concurrency_limit_by_name(LIMIT)
            if step == 0:
                yield prefect


@pytest.fixture
def lease(prefect: Any) -> Callable[[str], UUID]:
    """lease(state): a slot leased by a task of a flow run in that state. Returns the flow run's id."""
    from prefect import flow, states, task
    from prefect.client.schemas.objects import ConcurrencyLeaseHolder

    @flow
    def some_flow() -> None:
        return

    @task
    def some_task() -> None:
        return

    def take(state: str) -> UUID:
        run = prefect.create_flow_run(some_flow, state=states.Running())
        made = prefect.create_task_run(some_task, flow_run_id=run.id, dynamic_key="0", state=states.Pending())
        prefect.increment_concurrency_slots_with_lease(
            names=[LIMIT],
            slots=1,
            mode="concurrency",
            lease_duration=60,
            holder=ConcurrencyLeaseHolder(type="task_run", id=made.id),
        )
        if state != "Running":
            prefect.set_flow_run_state(run.id, getattr(states, state)(), force=True)
        return UUID(str(run.id))

    return take
