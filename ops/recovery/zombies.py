"""The automation that sets flow runs without heartbeats to Crashed; an open-source Prefect server has none."""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from ops.servers import HEARTBEAT_SECONDS

NAME = "Crash zombie flow runs"


def ensure_zombie_automation() -> bool:
    """Create the automation, or update one that differs. Returns whether anything was changed."""
    wanted = Automation(
        name=NAME,
        description="A run that sent heartbeats and then nothing for three of them has died with its worker.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            # Any event: state changes are named after the state's name, and a run may end as Completed("NothingNew").
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=3 * HEARTBEAT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message=f"No heartbeat for {3 * HEARTBEAT_SECONDS} s: the flow run's process is gone.",
                force=False,
            )
        ],
    )
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(NAME)
        if not found:
            wanted.create()
            return True
        present = Automation(**found[0].model_dump())
        for duplicate in found[1:]:
            client.delete_automation(duplicate.id)
    if present.enabled and present.trigger == wanted.trigger and present.actions == wanted.actions:
        return False
    wanted.id = present.id
    wanted.update()
    return True


def zombie_automation_is_installed() -> bool:
    """Whether the server has the automation, and it is switched on."""
    with get_client(sync_client=True) as client:
        return any(automation.enabled for automation in client.read_automations_by_name(NAME))
