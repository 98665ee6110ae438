"""The progress of a training in the log and in Prefect."""

from __future__ import annotations

import os
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ops.courier import Courier
from tasks.progress_lines import ProgressLines


class Progress(ProgressLines):
    """Log lines, and Prefect's progress bar; the training never waits for Prefect."""

    def __init__(self, log: Any):
        super().__init__(log)
        self.artifact: UUID | None = None
        self.flow_run = UUID(str(flow_run.id)) if flow_run.id else None
        self.told = ""
        trouble = "Prefect's progress bar was not updated"
        self.courier = Courier(self._draw, "progress-artifact", trouble, log)

    def on_line(self, percent: float, line: str) -> None:
        self.courier.offer((percent, line))

    def _draw(self, value: tuple[float, str]) -> None:
        """Write percentage and line into the artifact. One try: Prefect's client would repeat it for a minute."""
        percent, line = value
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            self._look_at_the_state()
            if self.artifact is None:
                self.artifact = cast(UUID, create_progress_artifact(percent, key="train-progress", description=line))
            else:
                update_progress_artifact(self.artifact, percent, description=line)

    def _look_at_the_state(self) -> None:
        """Log a warning if Prefect takes the run for ended, which a user may have set: the training goes on."""
        if self.flow_run is None:
            return
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(self.flow_run).state
            ended = str(state.name) if state and state.is_final() else ""
        except ObjectNotFound:
            ended = "deleted"
        if ended and ended != self.told:
            self.log.warning(
                "for Prefect this run is %s, but its training goes on: `kill %d` ends it with a checkpoint",
                ended,
                os.getpid(),
            )
        self.told = ended
