"""``python -m ops.stack.deploy``: create work pool, limits, automation and deployments on a Prefect server.

The server is that of PREFECT_API_URL. Each call updates everything from prefect.yaml and the settings. ``make up``
does the same by itself; ``make deploy`` is for a server that runs elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml

from ops.servers import Servers
from ops.settings import PROJECT_ROOT
from ops.stack.nightly import DEPLOYMENT, NightlyError, describe, is_on

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

WAITING_RUNS = 2  # flow runs beyond the number of GPUs that may start, to show what they wait for


class DeployError(RuntimeError):
    """The server does not answer, requires a password, or refuses a deployment; the message says which."""


def set_up(client: SyncPrefectClient, gpus: int) -> None:
    """Create work pool, limit of simultaneous trainings and automation, or update them.

    Args:
        gpus: number of simultaneous trainings over all workers.
    """
    # Imported here: these imports take seconds, in which a server starts.
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    from ops.recovery.limits import LIMIT, POOL
    from ops.recovery.zombies import ensure_zombie_automation

    runs = gpus + WAITING_RUNS
    try:
        client.read_work_pool(POOL)
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=runs))
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=runs)
        )
    client.upsert_global_concurrency_limit_by_name(LIMIT, gpus)
    ensure_zombie_automation()


def deploy(client: SyncPrefectClient) -> None:
    """Create or update all deployments of prefect.yaml.

    A schedule is created paused. One that is there already stays on or off, as its user has left it.

    Raises:
        DeployError: the command failed; the message has the end of its output.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with TemporaryDirectory() as scratch:
        if not _has_schedule(client):
            paused = Path(scratch) / "prefect.yaml"
            paused.write_text(_with_paused_schedules((PROJECT_ROOT / "prefect.yaml").read_text()))
            command += ["--prefect-file", str(paused)]
        done = subprocess.run(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise DeployError(f"the deployments of prefect.yaml were refused:\n{done.stdout[-3000:]}")


def _has_schedule(client: SyncPrefectClient) -> bool:
    """Whether the server knows the schedule of the nights, on or off."""
    from prefect.exceptions import ObjectNotFound

    try:
        return bool(client.read_deployment_by_name(DEPLOYMENT).schedules)
    except ObjectNotFound:
        return False


def _with_paused_schedules(text: str) -> str:
    """The content of prefect.yaml with all schedules off: Prefect would plan runs as soon as it creates one."""
    content = yaml.safe_load(text)
    for deployment in content["deployments"]:
        for schedule in deployment.get("schedules", []):
            schedule["active"] = False
    return str(yaml.safe_dump(content))


def main() -> int:
    """Set up the server of PREFECT_API_URL. Returns the exit status."""
    from prefect.client.orchestration import get_client

    from ops.recovery.doctor import connect

    if not os.environ.get("PREFECT_API_URL"):
        print("set PREFECT_API_URL to the server's address, as client.env of make up does", file=sys.stderr)
        return 2
    try:
        with get_client(sync_client=True) as client:
            if missing := connect(client):
                raise DeployError(missing)
            set_up(client, Servers.load().gpus)
            deploy(client)
        print(describe(is_on(os.environ["PREFECT_API_URL"], os.environ.get("PREFECT_API_AUTH_STRING"))))
    except (ValueError, DeployError, NightlyError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
