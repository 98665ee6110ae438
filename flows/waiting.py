"""Holding a device, a training or the nights of a size, and showing in Prefect what a flow run waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run

from model.net.device import device_choices, device_key
from ops.machine.lock import exclusive
from ops.machine.lock_file import shared_directory
from ops.recovery.limits import is_temporary, read_slots, release_all
from ops.settings import Settings
from ops.text import storable
from ops.tracking.registry import shared_name
from ops.tracking.stopwatch import end_step
from tasks.gang import Devices, held_devices

WAITING_FOR_GPU = "WaitingForGpu"
WAITING_FOR_TRAINING = "WaitingForTraining"
WAITING_FOR_NIGHT = "WaitingForNight"
_POLL_SECONDS = 2.0


@contextmanager
def hold_devices(device: str, gpus: int | str) -> Iterator[Devices]:
    """Hold devices of the machine against the runs of all users; the arguments are those of ``held_devices``."""
    log = get_run_logger()
    waiting = _Waiting(WAITING_FOR_GPU, "waiting-for-gpu")
    name, run_id = str(flow_run.name), str(flow_run.id)
    with held_devices(device, gpus, name, log.info, waiting.show, run_id) as devices:
        _free_slots(waiting)
        end_step("wait")
        yield devices


def count_devices(device: str) -> int:
    """How many devices satisfy ``device``, held or not."""
    return len(device_choices(device))


def other_devices(device: str, held: str) -> dict[str, str]:
    """The devices that satisfy ``device`` besides the one that is held, by the names of their locks."""
    return {device_key(place): str(place) for place in device_choices(device) if str(place) != held}


@contextmanager
def hold_training(settings: Settings, identity: str) -> Iterator[None]:
    """Hold a training: two runs of one training would overwrite each other's checkpoints."""
    waiting = _Waiting(WAITING_FOR_TRAINING, "waiting-for-training")
    with _hold(settings.locks, f"training {identity[:16]}", waiting):
        yield


@contextmanager
def hold_nights(settings: Settings, size: str) -> Iterator[None]:
    """Hold the nights of a size against all runs of this machine that use the same MLflow server.

    Two nights at once would choose the same rows.
    """
    waiting = _Waiting(WAITING_FOR_NIGHT, "waiting-for-night")
    what = shared_name(settings.tracking_uri, f"nights of {size}")
    with _hold(shared_directory(settings.device_locks), what, waiting):
        yield


@contextmanager
def _hold(directory: Path, what: str, waiting: _Waiting) -> Iterator[None]:
    """Hold one lock for this flow run, and show in Prefect that it waits."""
    log, name, run_id = get_run_logger(), str(flow_run.name), str(flow_run.id)
    with exclusive(directory, what, name, log.info, show=waiting.show, flow_run_id=run_id):
        yield


def _free_slots(waiting: _Waiting) -> None:
    """Wait until Prefect has a free slot, and show that the run waits: Prefect itself says nothing.

    This run holds the device already. A missing slot is then either the lease of a run that died, which is released
    here, or a limit below the number of GPUs.
    """
    log = get_run_logger()
    told = ""
    while message := _slots_taken():
        if message != told:
            log.info(message)
            waiting.show(message)
            told = message
        time.sleep(_POLL_SECONDS)
    if told:
        waiting.show(None)


def _slots_taken() -> str | None:
    """What a task with the tag gpu would wait for now; None if it would start at once."""
    try:
        with get_client(sync_client=True) as client:
            slots = None if is_temporary(client) else read_slots(client)
            if slots is None or not 0 < slots.limit <= slots.active:
                return None
            if slots.dead and len(slots.dead) == len(slots.holders):
                release_all(client)
                return None
    except Exception:  # the task meets the same trouble, and reports it
        return None
    return f"the device is free, but {slots.describe()}"


class _Waiting:
    """Shows in Prefect that the flow run waits: by name and message of its state, and by an artifact.

    Errors in either never stop the run.
    """

    def __init__(self, state_name: str, artifact_key: str):
        self.state_name = state_name
        self.artifact_key = artifact_key
        self.artifact: UUID | None = None
        self.since = 0.0

    def show(self, message: str | None) -> None:
        """Show the reason to wait; None ends the wait."""
        try:
            message = None if message is None else storable(message)
            with get_client(sync_client=True) as client:
                if message is None:
                    waited = f"waited {time.monotonic() - self.since:.0f} s"
                    self._set_state(client, "Running", waited)
                    self._write(client, f"Over: {waited}.")
                else:
                    self.since = self.since or time.monotonic()
                    self._set_state(client, self.state_name, message)
                    self._write(client, f"{message[0].upper()}{message[1:]}.")
        except Exception as error:
            get_run_logger().warning("Prefect does not show that this run waits: %s", error)

    def _set_state(self, client: SyncPrefectClient, name: str, message: str) -> None:
        run = client.read_flow_run(UUID(str(flow_run.id)))
        # A cancellation, or another state set by a user meanwhile, must stay.
        if run.state and run.state.is_running():
            client.set_flow_run_state(run.id, State(type=StateType.RUNNING, name=name, message=message))

    def _write(self, client: SyncPrefectClient, text: str) -> None:
        if self.artifact is None:
            artifact = ArtifactCreate(
                key=self.artifact_key,
                type="markdown",
                description="Whom this run waits for",
                data=text,
                flow_run_id=UUID(str(flow_run.id)),
            )
            self.artifact = client.create_artifact(artifact).id
        else:
            client.update_artifact(self.artifact, ArtifactUpdate(data=text))
