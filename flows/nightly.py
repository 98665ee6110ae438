"""What precedes the run of a night: no other night of the size runs, and rows are chosen that none has trained on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.job import NightConfig
from flows.waiting import hold_nights
from model.data.config import PrepareConfig
from ops.settings import Settings
from ops.tracking.ledger import caught_up, record_night
from ops.tracking.promotion import complete_promotion
from ops.tracking.registry import model_name
from ops.tracking.runs import RunRef
from tasks.choose import choose
from tasks.config import SourceConfig
from tasks.download import download
from tasks.references import Sources, SubsetRef


@dataclass(frozen=True)
class Night:
    """A night under way.

    Attributes:
        sources: what is already here.
        prepare: how rows are prepared: the chosen ones only.
        subset: the chosen rows.
        begun: when the night looked at the data.
        held: keeps other nights of the size waiting until it is closed: they would choose the same rows.
    """

    sources: Sources
    prepare: PrepareConfig
    subset: SubsetRef
    begun: datetime
    held: ExitStack

    def record(self, run: RunRef, size: str) -> None:
        """Write the night into the ledger; it counts once the run is FINISHED, or its version champion."""
        counts = {"nightly.fresh": str(self.subset.fresh), "nightly.replay": str(self.subset.replay)}
        tags = {**counts, "subset": f"next:{self.subset.sha256[:12]}"}
        record_night(run, model_name(size), Path(self.subset.folder), self.begun, tags)


def begin_night(
    settings: Settings, sources: SourceConfig, prepare: PrepareConfig, night: NightConfig
) -> Night | State[Any]:
    """Wait for other nights of the size, fetch what is needed, and choose rows.

    Args:
        prepare: its ``subset_count`` limits the fresh rows.

    Returns:
        The night, or the state in which the flow ends at once: CaughtUp or NothingNew.
    """
    size, dataset = sources.model_size, sources.dataset
    scheduled = flow_run.scheduled_start_time
    with ExitStack() as stack:
        stack.enter_context(hold_nights(settings, size))
        begun = datetime.now(UTC)
        if run_id := complete_promotion(settings.tracking_uri, model_name(size)):
            get_run_logger().info("MLflow run %s was killed in its promotion: its night counts", run_id)
        if caught_up(settings.tracking_uri, model_name(size), dataset, scheduled):
            message = f"due at {scheduled:%Y-%m-%d %H:%M %Z}; a successful night on this data began after that"
            return Completed(name="CaughtUp", message=message)
        fetched = download(sources)
        subset = choose(fetched, size, dataset, prepare, prepare.subset_count, night.replay_share)
        if subset is None:
            return Completed(name="NothingNew", message=f"every row of {dataset} has been trained on by a night")
        chosen = replace(prepare, subset_count=None, subset_keys=subset.keys)
        return Night(fetched, chosen, subset, begun, stack.pop_all())
