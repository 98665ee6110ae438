"""What precedes the run of a night: no other night of the size, and rows that none has trained on."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.waiting import hold_nights
from model.data.preparing import PrepareConfig
from ops.settings import Settings
from ops.tracking.ledger import caught_up, record_night
from ops.tracking.registry import model_name
from ops.tracking.runs import RunRef
from tasks.choose import choose
from tasks.download import download
from tasks.references import Sources, SubsetRef


@dataclass(frozen=True)
class Night:
    """A night under way.

    Attributes:
        sources: what is already here.
        subset: the rows chosen.
        begun: when it looked at the data.
        held: keeps other nights of the size waiting until it is closed: they would choose the same rows.
    """

    sources: Sources
    subset: SubsetRef
    begun: datetime
    held: ExitStack

    def record(self, run: RunRef, size: str) -> None:
        """Write it into the ledger, where it counts once the run is FINISHED, or its version champion."""
        counts = {"nightly.fresh": str(self.subset.fresh), "nightly.replay": str(self.subset.replay)}
        tags = {**counts, "subset": f"next:{self.subset.sha256[:12]}"}
        record_night(run, model_name(size), Path(self.subset.folder), self.begun, tags)


def begin_night(
    settings: Settings,
    scheduled: datetime,
    wanted: dict[str, Any],
    config: PrepareConfig,
    count: int | None,
    replay_share: float,
) -> Night | State[Any]:
    """Wait for other nights of the size, and choose rows.

    Args:
        scheduled: when this night was due.
        wanted: the arguments of ``download``.
        config: how rows are going to be prepared; its subset plays no part.
        count: fresh rows at most.
        replay_share: of all rows, those that were used before.

    Returns:
        The night, or the state in which the flow ends at once: CaughtUp or NothingNew.
    """
    size, dataset = wanted["model_size"], wanted["dataset"]
    with ExitStack() as stack:
        stack.enter_context(hold_nights(settings, size))
        begun = datetime.now(UTC)
        if caught_up(settings.tracking_uri, model_name(size), dataset, scheduled):
            message = f"due at {scheduled:%Y-%m-%d %H:%M %Z}; a successful night on this data began after that"
            return Completed(name="CaughtUp", message=message)
        sources = download(**wanted)
        subset = choose(sources, size, dataset, config, count, replay_share)
        if subset is None:
            return Completed(name="NothingNew", message=f"every row of {dataset} has been trained on by a night")
        return Night(sources, subset, begun, stack.pop_all())
