"""``python -m ops.stack.up``: both servers, a worker and the watcher, until Ctrl-C. ``down``: end them.

supervisord (ops/stack/supervisord.conf) runs them and restarts what dies; ops/stack/ready.py sets Prefect up. This
process begins and ends them: one at a time on a data root, and no process is left behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ops.machine.flock import hold_file
from ops.machine.process import Process, end_processes, tagged
from ops.servers import TAG_VARIABLE, USER, Servers

SAVE_SECONDS = 45.0  # for a training to reach its next step and to save a checkpoint
STOP_SECONDS = 100.0  # for all of it
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def up(servers: Servers) -> int:
    """Start everything, wait until it is ready, say so, and stay until told to end. Returns the exit status."""
    servers.logs.mkdir(parents=True, exist_ok=True)
    (servers.home / "prefect").mkdir(exist_ok=True)
    with hold_file(_lock_file(servers), wait=False) as lock:
        if lock is None:
            _say(f"make up is running already (pid {_running(servers).get('pid', 'unknown')})")
            _say(_running(servers).get("banner", f"{servers.prefect_url}\n{servers.mlflow_url}"))
            return 0
        _note(lock, {"pid": os.getpid()})
        # The worker by force: asked to end, it would kill its flow runs.
        left = end_processes(lambda: _workers(servers), -1)
        left += end_processes(lambda: _strays(servers, runs=False), 15)
        for process in left:
            _say(f"ended what a run before had left: {process}")
        for process in _strays(servers, runs=True):
            _say(f"left alone, a flow run that outlived the run before: {process}")
        if taken := servers.taken_ports():
            _say("\n".join(taken))
            return 1
        return _run(servers, lock)


def down(servers: Servers) -> int:
    """End a running ``make up``, or what is left of one; say what was ended. Returns the exit status."""
    if not servers.home.is_dir():
        _say(f"nothing to end: {servers.home} does not exist")
        return 0
    asked: int | None = None
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        with hold_file(_lock_file(servers), wait=False) as lock:
            if lock:
                ended = _end_runs(servers) + end_processes(lambda: _strays(servers), 15)
                for process in ended:
                    _say(f"ended {process}")
                if not asked and not ended:
                    _say(f"nothing to end: no process of {servers.home} is alive")
                return 0
            # Whoever holds the lock lives, and has written its number into the file.
            holder = _running(servers).get("pid")
            if asked is None and holder is not None:
                asked = int(holder)
                _say(f"ending make up (pid {asked})")
                os.kill(asked, signal.SIGTERM)
        time.sleep(0.2)
    _say(f"make up (pid {asked}) has not ended in {STOP_SECONDS:.0f} s: kill -9 {asked}, and make down again")
    return 1


def _run(servers: Servers, lock: TextIO) -> int:
    stops: list[float] = []

    # It takes no lock: a second signal may come within it (make passes on what the whole group got), and an Event's
    # set() within its set() waits for ever.
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
                # Such as MLflow's second process, when the first was killed: it would keep the port.
                for orphan in end_processes(lambda: _orphans(servers), 1):
                    _say(f"ended what a killed process had left: {orphan}")
                looked = time.monotonic()
            if supervisor.poll() is not None:
                _say(f"supervisord is gone (status {supervisor.returncode}): see {servers.logs / 'supervisord.log'}")
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
    """End everything in an order in which each can still tell the others: flow runs, worker, servers."""

    # Signals of one moment are one: a group's processes pass on to each other what all of them got.
    def hurry() -> bool:
        return bool(stops) and stops[-1] - stops[0] > 1

    if ready:
        ready.terminate()
    runs = {process.flow_run for process in _strays(servers, runs=True)}
    if runs:
        _say(f"ending {len(runs)} flow run(s), each when it has saved its checkpoint; Ctrl-C again: at once")
    _end_runs(servers, hurry)
    supervisor.terminate()
    deadline = time.monotonic() + STOP_SECONDS - SAVE_SECONDS
    while supervisor.poll() is None and time.monotonic() < deadline and not hurry():
        time.sleep(0.1)
    # Normally nobody is left: what supervisord could not end, or all of it, if supervisord was killed.
    end_processes(lambda: _strays(servers), 10, hurry)
    supervisor.wait()
    if ready:
        ready.wait()
    _say("everything has ended")


def _start(environment: dict[str, str], module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Run a module in a session of its own, where no Ctrl-C reaches it; it is told to end when this process dies."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=environment[TAG_VARIABLE],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM),
    )


def _end_runs(servers: Servers, hurry: Callable[[], bool] = bool) -> list[Process]:
    """End flow runs, then their worker. Returns those that were there.

    The worker is halted meanwhile: awake it would take the next run, and ended first it would kill its runs, without
    waiting for them.
    """
    for worker in _workers(servers):
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGSTOP)
    ended = end_processes(lambda: _strays(servers, runs=True), SAVE_SECONDS, hurry)
    return ended + end_processes(lambda: _workers(servers), 10, hurry)


def _workers(servers: Servers) -> list[Process]:
    return [process for process in _strays(servers, runs=False) if "prefect worker start" in process.command]


def _orphans(servers: Servers) -> list[Process]:
    """What a killed program of supervisord has left behind; flow runs outlive their worker on purpose."""
    everybody = _strays(servers)
    parents = {os.getpid(), *(process.pid for process in everybody)}
    return [process for process in everybody if process.flow_run is None and process.parent not in parents]


def _strays(servers: Servers, runs: bool | None = None) -> list[Process]:
    """What carries the mark of this data root; only flow runs, or only the rest of it."""
    return [p for p in tagged(TAG_VARIABLE, str(servers.home)) if runs is None or runs is (p.flow_run is not None)]


def _lock_file(servers: Servers) -> Path:
    """The file that `make up` holds while it runs, with its pid and banner as JSON."""
    return servers.home / "up.lock"


def _note(lock: TextIO, facts: dict[str, Any]) -> None:
    lock.seek(0)
    lock.truncate()
    json.dump(facts, lock)
    lock.flush()


def _running(servers: Servers) -> dict[str, Any]:
    """What the holder of the lock has noted; nothing at the moment at which it does so."""
    try:
        return json.loads(_lock_file(servers).read_text())
    except ValueError:
        return {}


def _banner(servers: Servers) -> str:
    lines = [f"Prefect  {servers.prefect_url}", f"MLflow   {servers.mlflow_url}"]
    if servers.secure:
        lines.append(f"Both ask for a password: user {USER}, password in {_short(servers.password_file)}")
        lines.append(f"(Prefect's page wants both in one: {USER}:PASSWORD)")
    elif not servers.is_local:
        lines.append(f"No password, on {servers.host}: whoever reaches a port can run code on this machine.")
    lines += [
        "",
        "Next, in another terminal:",
        f"  . {_short(servers.client_file)}",
        f"  {_short(Path(sys.executable).parent / 'prefect')} deployment run finetune/tiny --watch",
    ]
    return "\n".join(lines)


def _short(path: Path) -> str:
    """As it is typed here."""
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
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
