"""``finetune up``: run both servers, a worker and the watcher until Ctrl-C. ``finetune down``: end them.

supervisord (ops/stack/supervisord.conf) runs the programs and restarts those that die; ops/stack/ready.py sets
Prefect up. This process starts supervisord and ends everything. Only one runs on a data root, and it leaves no
process behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, Field

from model.records import read_record
from ops.databases import check_address
from ops.machine.flock import hold_file
from ops.machine.process import Process, end_processes, tagged
from ops.mistakes import refuse
from ops.servers import TAG_VARIABLE, USER, Servers
from ops.settings import DataRootError
from ops.stack.nightly import NightlyError, describe, is_on
from ops.stack.ready import runs_page

SAVE_SECONDS = 45.0  # time for a training to reach its next step and to save a checkpoint
STOP_SECONDS = 100.0  # time for everything to end
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def up(servers: Servers) -> int:
    """Start everything, print a banner when it is ready, and run until a signal. Returns the exit status.

    Raises:
        DatabaseError: a server could not use its database.
        DataRootError: the data root cannot be written.
    """
    try:
        servers.logs.mkdir(parents=True, exist_ok=True)
        (servers.home / "prefect").mkdir(exist_ok=True)
    except OSError as error:
        raise DataRootError.of(servers.home.parent, error) from error
    with hold_file(_lock_file(servers), wait=False) as lock:
        if lock is None:
            _say(f"make up is running already (pid {_running(servers).pid or 'unknown'})")
            _say(_running(servers).banner or f"{servers.prefect_url}\n{servers.mlflow_url}")
            return 0
        _note(lock, {"pid": os.getpid()})
        # The worker by SIGKILL: after SIGTERM it would kill its flow runs.
        left = end_processes(lambda: _workers(servers), -1)
        left += end_processes(lambda: _started_processes(servers, runs=False), 15)
        for process in left:
            _say(f"ended, left by an earlier make up: {process}")
        for process in _started_processes(servers, runs=True):
            _say(f"left alone, a flow run that outlived an earlier make up: {process}")
        for address, owner in servers.databases().items():
            check_address(address, owner)
        if taken := servers.taken_ports():
            _say("\n".join(taken))
            return 1
        return _run(servers, lock)


def down(servers: Servers) -> int:
    """End a running ``make up``, or processes that a dead one left, and print them. Returns the exit status."""
    if not servers.home.is_dir():
        _say(f"nothing to end: {servers.home} does not exist")
        return 0
    asked: int | None = None
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        with hold_file(_lock_file(servers), wait=False) as lock:
            if lock:
                ended = _end_runs(servers) + end_processes(lambda: _started_processes(servers), 15)
                for process in ended:
                    _say(f"ended {process}")
                if not asked and not ended:
                    _say(f"nothing to end: no process of {servers.home} is alive")
                return 0
            # The holder of the lock is alive, and has written its pid into the file.
            holder = _running(servers).pid
            if asked is None and holder is not None:
                asked = holder
                _say(f"ending make up (pid {asked})")
                os.kill(asked, signal.SIGTERM)
        time.sleep(0.2)
    _say(f"make up (pid {asked}) has not ended in {STOP_SECONDS:.0f} s: run kill -9 {asked}, then make down again")
    return 1


def _run(servers: Servers, lock: TextIO) -> int:
    """Run supervisord until a signal, or until it ends. Returns the exit status."""
    stops: list[float] = []

    # A list, because a second signal may interrupt this handler (make passes on a signal that the whole group got),
    # and an Event.set() that interrupts another one waits for ever.
    def handle(number: int, _: Any) -> None:
        stops.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)
    servers.write_client_file()
    environment = servers.environment()
    began = time.monotonic()
    _say(f"starting Prefect and MLflow; logs are in {servers.logs}")
    configuration = str(Path(__file__).with_name("supervisord.conf"))
    supervisor = _start(environment, "supervisor.supervisord", "-c", configuration)
    ready: subprocess.Popen[bytes] | None = _start(environment, "ops.stack.ready")
    status = 0
    try:
        looked = began
        while not stops:
            time.sleep(0.2)
            if time.monotonic() - looked > 2:
                # MLflow's second process, for example, would keep the port after the first one was killed.
                for orphan in end_processes(lambda: _orphans(servers), 1):
                    _say(f"ended, left by a killed process: {orphan}")
                looked = time.monotonic()
            if supervisor.poll() is not None:
                _say(f"supervisord ended (status {supervisor.returncode}): see {servers.logs / 'supervisord.log'}")
                status = 1
                break
            if ready and ready.poll() is not None:
                if ready.returncode:
                    status = 1
                    break
                ready = None
                banner = _banner(servers)
                _note(lock, {"pid": os.getpid(), "banner": banner})
                _say(f"{banner}\n\nready after {time.monotonic() - began:.0f} s; Ctrl-C ends it")
    finally:
        _stop(servers, supervisor, ready, stops)
    return status


def _stop(
    servers: Servers, supervisor: subprocess.Popen[bytes], ready: subprocess.Popen[bytes] | None, stops: list[float]
) -> None:
    """End flow runs, then the worker, then the servers, so that each can still report its end to the next."""

    # Signals within a second count as one: make passes on a signal that the whole process group got.
    def hurry() -> bool:
        return bool(stops) and stops[-1] - stops[0] > 1

    if ready:
        ready.terminate()
    runs = {process.flow_run for process in _started_processes(servers, runs=True)}
    if runs:
        _say(f"ending {len(runs)} flow run(s), each after its checkpoint is saved; press Ctrl-C again to end at once")
    _end_runs(servers, hurry)
    supervisor.terminate()
    deadline = time.monotonic() + STOP_SECONDS - SAVE_SECONDS
    while supervisor.poll() is None and time.monotonic() < deadline and not hurry():
        time.sleep(0.1)
    # Processes that supervisord could not end, or all of them if it was killed; normally there are none.
    end_processes(lambda: _started_processes(servers), 10, hurry)
    supervisor.wait()
    if ready:
        ready.wait()
    _say("everything has ended")


def _start(environment: dict[str, str], module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Run a module in its own session, which Ctrl-C does not reach; it gets SIGTERM when this process dies."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=environment[TAG_VARIABLE],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM),
    )


def _end_runs(servers: Servers, hurry: Callable[[], bool] = lambda: False) -> list[Process]:
    """End flow runs, then their worker. Returns the ended processes.

    The worker is stopped (SIGSTOP) first. If it ran on, it would start the next flow run; if it ended first, it would
    kill its flow runs without waiting for their checkpoints.
    """
    for worker in _workers(servers):
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGSTOP)
    ended = end_processes(lambda: _started_processes(servers, runs=True), SAVE_SECONDS, hurry)
    return ended + end_processes(lambda: _workers(servers), 10, hurry)


def _workers(servers: Servers) -> list[Process]:
    others = _started_processes(servers, runs=False)
    return [process for process in others if "prefect worker start" in process.command]


def _orphans(servers: Servers) -> list[Process]:
    """Processes left by a killed program of supervisord; without flow runs, which may outlive their worker."""
    started = _started_processes(servers)
    parents = {os.getpid(), *(process.pid for process in started)}
    return [process for process in started if process.flow_run is None and process.parent not in parents]


def _started_processes(servers: Servers, runs: bool | None = None) -> list[Process]:
    """Processes of a `make up` on this data root: all (None), only flow runs (True), or only the others (False)."""
    return [p for p in tagged(TAG_VARIABLE, str(servers.home)) if runs is None or runs is (p.flow_run is not None)]


def _lock_file(servers: Servers) -> Path:
    """The file that `make up` holds while it runs, with its pid and banner as JSON."""
    return servers.home / "up.lock"


def _note(lock: TextIO, facts: dict[str, Any]) -> None:
    """Write facts about this process into its lock file, for `make down` and a second `make up`."""
    lock.seek(0)
    lock.truncate()
    json.dump(facts, lock)
    lock.flush()


class _Running(BaseModel):
    """What the holder of the lock has written into it."""

    pid: int | None = Field(default=None, gt=1)  # 1, 0 and -1 are no `make up`, and a signal to them ends all others
    banner: str | None = None


def _running(servers: Servers) -> _Running:
    """What the holder of the lock has written into it; nothing while it is writing, or if the file is damaged."""
    try:
        return read_record(_lock_file(servers), _Running)
    except ValueError:
        return _Running()


def _banner(servers: Servers) -> str:
    lines = [f"Prefect  {servers.prefect_url}", f"MLflow   {runs_page(servers)}"]
    if servers.secure:
        lines.append(f"Both require a password: user {USER}, password in {_short(servers.password_file)}")
        lines.append(f"(Prefect's page takes both in one field: {USER}:PASSWORD)")
    elif not servers.is_local:
        lines.append(f"No password on {servers.host}: anyone who can reach a port can run code on this machine.")
    with suppress(NightlyError):
        known = servers.client_environment()
        lines += ["", describe(is_on(known["PREFECT_API_URL"], known.get("PREFECT_API_AUTH_STRING")))]
    lines += [
        "",
        "Next, in another terminal:",
        f"  . {shlex.quote(_short(servers.client_file))}",
        f"  {shlex.quote(_short(Path(sys.executable).parent / 'prefect'))} deployment run finetune/tiny --watch",
    ]
    return "\n".join(lines)


def _short(path: Path) -> str:
    """A path relative to the working directory if it lies below it, else absolute."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: list[str]) -> int:
    """``up`` or ``down``. Returns the exit status."""
    if arguments not in ([], ["down"]):
        print(f"python -m ops.stack.up [down], not {' '.join(arguments)}", file=sys.stderr)
        return 2
    try:
        servers = Servers.load()
        return down(servers) if arguments else up(servers)
    except (OSError, ValueError, RuntimeError) as error:
        return refuse(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
