"""``finetune doctor [--fix]``: compares limits, leases, locks and states; prints each contradiction.

The lock files decide who has a device. Prefect's and MLflow's records only display it and can be wrong after a crash;
``--fix`` mends them.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

# Without a server there is nothing to examine, and Prefect's client should not start a temporary one.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from ops.machine.lock_file import read_locks
from ops.machine.process import Process, end_processes, find_process
from ops.parsers import doctor_parser
from ops.recovery.limits import (
    LEASE_SECONDS,
    LIMIT,
    POOL,
    ensure_limit,
    read_slots,
    release_all,
    set_active,
    set_limit,
)
from ops.recovery.reaper import close_stale, read_flow_run, stale_runs
from ops.recovery.zombies import NAME as AUTOMATION
from ops.recovery.zombies import ensure_zombie_automation, zombie_automation_is_installed
from ops.redaction import without_credentials
from ops.servers import Servers
from ops.settings import Settings
from ops.tracking.connection import client as mlflow_client

_KILL_SECONDS = 10.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Finding:
    """A contradiction that was found.

    Attributes:
        text: one line; where ``mend`` is None it says what to do.
        mend: mends it; None if only people can.
    """

    text: str
    mend: Callable[[], object] | None = None


def examine(settings: Settings, gpus: int, prefect: SyncPrefectClient | None) -> list[Finding]:
    """All findings, in the order in which they are to be mended.

    Args:
        gpus: number of simultaneous trainings that the limit should allow.
        prefect: a client of Prefect's server; None if it does not answer.
    """
    findings = [*_mlflow(settings, prefect), *_locks(settings, prefect)]
    if prefect is not None:
        findings += [*examine_slots(prefect, gpus), *_limit(prefect, gpus), *_server(prefect)]
    return findings


def connect(prefect: SyncPrefectClient) -> str | None:
    """Why Prefect's server cannot be used, as one line; None if it can."""
    url = PREFECT_API_URL.value()
    if not url:
        return "PREFECT_API_URL is not set: Prefect is not examined"
    url = without_credentials(url)
    try:
        prefect.hello()  # requires the password, unlike /health
    except Exception as error:
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 401:
            return f"Prefect at {url} {_requires_password()}"
        return f"no Prefect server answers at {url} ({type(error).__name__}): `make up` starts one"
    return None


def _requires_password() -> str:
    return f"requires a password: run `. {shlex.quote(str(Servers.load().client_file))}` first"


def examine_slots(prefect: SyncPrefectClient, gpus: int) -> Iterator[Finding]:
    """Findings on the leases and the count of the limit tag:gpu, not on its value, which people may set to 0."""
    slots = read_slots(prefect)
    if slots is None:
        yield Finding(
            f"there is no limit {LIMIT}: Prefect would let any number of trainings start (should be {gpus})",
            lambda: ensure_limit(prefect, gpus),
        )
        return
    leased = len(slots.holders)
    if slots.active > leased:
        yield Finding(
            f"{LIMIT} counts {slots.active} slots as taken, but only {leased} have a lease: the rest stay taken",
            lambda: set_active(prefect, leased),
        )
    if slots.dead:
        names = ", ".join(f"{run.name} ({run.state_name})" for run in slots.dead)
        text = f"a slot of {LIMIT} is still leased to {names}: Prefect frees it by itself within {LEASE_SECONDS} s"
        # Prefect's API revokes all leases of a limit or none.
        yield Finding(text, partial(release_all, prefect) if len(slots.dead) == leased else None)


def _limit(prefect: SyncPrefectClient, gpus: int) -> Iterator[Finding]:
    """Whether the limit has the value of FINETUNE_GPUS."""
    slots = read_slots(prefect)
    if slots is None or slots.limit == gpus:
        return
    text = f"the limit {LIMIT} is {slots.limit}, for {gpus} GPUs"
    if os.environ.get("FINETUNE_GPUS"):
        yield Finding(f"{text} (FINETUNE_GPUS)", lambda: set_limit(prefect, gpus))
    else:  # the remaining GPUs may be in other machines
        yield Finding(
            f"{text} of this machine: set FINETUNE_GPUS to the number of GPUs of all machines, as client.env does"
        )


def _mlflow(settings: Settings, prefect: SyncPrefectClient | None) -> Iterator[Finding]:
    """MLflow runs whose flow run or process has ended."""
    try:
        mlflow_client(settings.tracking_uri).search_experiments(max_results=1)
    except Exception as error:
        refused = getattr(error, "error_code", "") == "UNAUTHENTICATED"
        problem = _requires_password() if refused else f"does not answer ({type(error).__name__})"
        yield Finding(f"MLflow at {without_credentials(settings.tracking_uri)} {problem}")
        return
    for stale in stale_runs(settings.tracking_uri, lambda flow_run_id: read_flow_run(prefect, flow_run_id)):
        yield Finding(
            f"MLflow run {stale.name} is RUNNING and should be {stale.status}: {stale.reason}",
            partial(close_stale, stale, prefect),
        )


def _locks(settings: Settings, prefect: SyncPrefectClient | None) -> Iterator[Finding]:
    """Locks whose holder has died or has ended in Prefect."""
    for directory in (settings.device_locks, settings.locks):
        for lock in read_locks(directory):
            if not lock.held or lock.owner is None:
                continue
            if lock.owner.is_dead:
                # The kernel frees the lock of a dead process, so a living child has inherited it.
                left = [process for process in map(find_process, lock.pids) if process]
                if lock not in read_locks(directory):  # freed meanwhile, and perhaps taken by a run that waited
                    continue
                named = ", ".join(f"pid {process.pid} ({process.command_line})" for process in left)
                yield Finding(
                    f"{lock.what} is held by {named or 'a process not visible to this user'}, "
                    f"left behind by {lock.holder}, which died",
                    partial(_end, left) if left else None,
                )
                continue
            run = read_flow_run(prefect, lock.flow_run_id) if lock.flow_run_id else None
            if run and run.state and run.state.is_final():
                yield Finding(
                    f"{lock.what} is held by {lock.holder}, which is {run.state.name} in Prefect, but its process "
                    f"lives: `kill {lock.owner.pid}` makes it save a checkpoint and end"
                )


def _server(prefect: SyncPrefectClient) -> Iterator[Finding]:
    """The server's automation, its storage of leases, and its workers."""
    if not zombie_automation_is_installed():
        yield Finding(
            f"the automation {AUTOMATION!r} is missing: a run that dies with its worker would stay Running for ever",
            ensure_zombie_automation,
        )
    storage = prefect.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"]
    if storage.endswith(".memory"):
        yield Finding(
            "Prefect's server keeps leases in memory: the slots in use leak when it restarts; start it with "
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem"
        )
    try:
        workers = prefect.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        ).json()
    except PrefectHTTPStatusError:  # there is no such pool
        workers = []
    if not any(worker["status"] == "ONLINE" for worker in workers):
        yield Finding(f"no worker of the pool {POOL} is online: no deployment will run; `make up` starts one")


def _end(processes: list[Process]) -> None:
    """End these and no others: a process that has taken the lock since belongs to a run that waited for it."""

    def living() -> list[Process]:
        return [process for process in processes if process.identity.is_alive]

    end_processes(living, _KILL_SECONDS)
    if left := living():
        raise RuntimeError(f"still running after SIGKILL: pid {', '.join(str(process.pid) for process in left)}")


def main(arguments: list[str]) -> int:
    """Print the findings, and mend them with ``--fix``.

    Returns:
        The exit status: 0 if there is no finding left, 1 if there is, 2 for a wrong setting.
    """
    fix = doctor_parser().parse_args(arguments).fix
    try:
        settings, gpus = Settings.load(), Servers.load().gpus
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    with get_client(sync_client=True) as prefect:
        missing = connect(prefect)
        answering = None if missing else prefect
        findings = examine(settings, gpus, answering)
        if missing:
            findings.insert(0, Finding(missing))
        for finding in findings:
            print(_line(finding, fix))
        if fix and any(finding.mend for finding in findings):
            left = examine(settings, gpus, answering)
            for finding in left:
                if finding.text not in {before.text for before in findings}:
                    print(_line(finding, fix))
            findings = examine(settings, gpus, answering)
    if not findings:
        print("all is well: limits, leases, locks, states and processes agree")
    return 1 if findings else 0


def _line(finding: Finding, fix: bool) -> str:
    """The finding as a line of output; with ``fix`` it is mended first."""
    if finding.mend is None:
        return f"- {finding.text}"
    if not fix:
        return f"- {finding.text} [--fix mends it]"
    try:
        finding.mend()
    except Exception as error:
        return f"- {finding.text} [not mended: {error}]"
    return f"- {finding.text} [mended]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
