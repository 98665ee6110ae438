"""``python -m ops.recovery.doctor [--fix]``: compares limits, leases, locks and states; prints each fault.

The lock files decide who has a device. All else only displays, and can be wrong after a crash; ``--fix`` mends it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

# Without a server there is nothing to examine: none is to be started for it.
os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "false")

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from ops.machine.lock import read_locks
from ops.machine.process import Process, end_processes, find_process
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
from ops.servers import Servers
from ops.settings import Settings
from ops.tracking.runs import client as mlflow_client

_KILL_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        text: one line, with what to do if nothing can be mended from here.
        mend: does it; None where only people can.
    """

    text: str
    mend: Callable[[], object] | None = None


def examine(settings: Settings, gpus: int, prefect: SyncPrefectClient | None) -> list[Finding]:
    """All that is wrong, in the order in which it is to be mended.

    Args:
        gpus: trainings at a time that the limit should allow.
        prefect: a client of a server that answers; None if there is none.
    """
    findings = [*_mlflow(settings, prefect), *_locks(settings, prefect)]
    if prefect is not None:
        findings += [*examine_slots(prefect, gpus), *_limit(prefect, gpus), *_server(prefect)]
    return findings


def connect(prefect: SyncPrefectClient) -> str | None:
    """Why Prefect's server cannot be asked; None if it can."""
    url = PREFECT_API_URL.value()
    if not url:
        return "PREFECT_API_URL is not set: Prefect is not looked at"
    try:
        prefect.hello()  # unlike /health it wants the password
    except Exception as error:
        if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == 401:
            return f"Prefect at {url} {_wants_password()}"
        return f"no Prefect server answers at {url} ({type(error).__name__}): `make up` starts one"
    return None


def _wants_password() -> str:
    return f"wants a password: `. {Servers.load().client_file}` first"


def examine_slots(prefect: SyncPrefectClient, gpus: int) -> Iterator[Finding]:
    """What is wrong with the limit tag:gpu, its leases and its count; its value is for people to choose."""
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
            f"{LIMIT} counts {slots.active} slots as taken, and {leased} have a lease: nobody would free the others",
            lambda: set_active(prefect, leased),
        )
    if slots.dead:
        names = ", ".join(f"{run.name} ({run.state_name})" for run in slots.dead)
        text = f"a slot of {LIMIT} is still leased to {names}: free by itself within {LEASE_SECONDS} s"
        # A single lease cannot be revoked from outside; the others' would go with it.
        yield Finding(text, partial(release_all, prefect) if len(slots.dead) == leased else None)


def _limit(prefect: SyncPrefectClient, gpus: int) -> Iterator[Finding]:
    slots = read_slots(prefect)
    if slots is None or slots.limit == gpus:
        return
    text = f"the limit {LIMIT} is {slots.limit}, for {gpus} GPUs"
    if os.environ.get("FINETUNE_GPUS"):
        yield Finding(f"{text} (FINETUNE_GPUS)", lambda: set_limit(prefect, gpus))
    else:  # other machines may have the others
        yield Finding(f"{text} of this machine: FINETUNE_GPUS, as in client.env, tells how many there are on all")


def _mlflow(settings: Settings, prefect: SyncPrefectClient | None) -> Iterator[Finding]:
    try:
        mlflow_client(settings.tracking_uri).search_experiments(max_results=1)
    except Exception as error:
        refused = getattr(error, "error_code", "") == "UNAUTHENTICATED"
        says = _wants_password() if refused else f"does not answer ({type(error).__name__})"
        yield Finding(f"MLflow at {settings.tracking_uri} {says}")
        return
    for stale in stale_runs(settings.tracking_uri, lambda flow_run_id: read_flow_run(prefect, flow_run_id)):
        yield Finding(
            f"MLflow run {stale.name} says RUNNING and should be {stale.status}: {stale.reason}",
            partial(close_stale, stale, prefect),
        )


def _locks(settings: Settings, prefect: SyncPrefectClient | None) -> Iterator[Finding]:
    for directory in (settings.device_locks, settings.locks):
        for lock in read_locks(directory):
            if not lock.held or lock.owner is None:
                continue
            if lock.owner.is_dead:
                # The kernel frees a dead process's lock: if it is held, a child inherited it and lives.
                left = [process for process in map(find_process, lock.pids) if process]
                if lock not in read_locks(directory):  # freed meanwhile, and perhaps a run's that waited for it
                    continue
                named = ", ".join(f"pid {process.pid} ({process.command_line})" for process in left)
                yield Finding(
                    f"{lock.what} is held by {named or 'not visible to this user'}, "
                    f"left behind by {lock.holder}, which died",
                    partial(_end, left) if left else None,
                )
                continue
            run = read_flow_run(prefect, lock.flow_run_id) if lock.flow_run_id else None
            if run and run.state and run.state.is_final():
                yield Finding(
                    f"{lock.what} is held by {lock.holder}, which Prefect says is {run.state.name}, but its process "
                    f"lives: `kill {lock.owner.pid}` makes it save a checkpoint and end"
                )


def _server(prefect: SyncPrefectClient) -> Iterator[Finding]:
    if not zombie_automation_is_installed():
        yield Finding(
            f"the automation {AUTOMATION!r} is not there: a run that dies with its worker would run for ever",
            ensure_zombie_automation,
        )
    storage = prefect.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"]
    if storage.endswith(".memory"):
        yield Finding(
            "Prefect's server keeps leases in memory: a restart of it leaks the slots in use; start it with "
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem"
        )
    try:
        workers = prefect.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        ).json()
    except PrefectHTTPStatusError:  # there is no such pool
        workers = []
    if not any(worker["status"] == "ONLINE" for worker in workers):
        yield Finding(f"no worker of the pool {POOL} is online: nothing that is deployed will run (`make up`)")


def _end(processes: list[Process]) -> None:
    """End these and no others: a process that has taken the lock since belongs to a run that waited for it."""

    def living() -> list[Process]:
        return [process for process in processes if process.identity.is_alive]

    end_processes(living, _KILL_SECONDS)
    if left := living():
        raise RuntimeError(f"it does not end: pid {', '.join(str(process.pid) for process in left)}")


def main(arguments: list[str]) -> int:
    """Print what is wrong, mend it with ``--fix``. Returns 1 while something is wrong, 2 if a setting is."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.recovery.doctor", description="What is wrong with the GPU's limits."
    )
    parser.add_argument("--fix", action="store_true", help="mend what can be mended")
    fix = parser.parse_args(arguments).fix
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
