"""The doctor: what it finds, on a real Prefect server, and that it mends what it can."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from made_up import MAKE

from ops.machine import lock
from ops.machine.lock import LockState, exclusive
from ops.machine.process import identify_process
from ops.recovery import doctor
from ops.recovery.doctor import Finding, examine, examine_slots, main
from ops.recovery.limits import LIMIT, ensure_limit, read_slots, set_active, set_limit
from ops.recovery.watch import Watcher
from ops.servers import gpu_count
from ops.settings import Settings
from ops.stack import deploy
from ops.tracking.runs import PROCESS_TAG, client, set_tags, tracked_run

LEFT = """
import os, subprocess, sys
from pathlib import Path
from ops.machine.lock import exclusive
with exclusive(Path(sys.argv[1]), "cpu", "a run that dies", print) as held:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], pass_fds=[held.descriptor],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    print(child.pid, flush=True)
    os._exit(1)
"""
WAITS = """
import sys, time
from pathlib import Path
from ops.machine.lock import exclusive
with exclusive(Path(sys.argv[1]), "cpu", "a run that waits", lambda line: print(line, flush=True)):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(mlflow_database, tmp_path / "mlflow" / "mlflow.db")
    monkeypatch.setenv("FINETUNE_LOCKS", str(tmp_path / "device-locks"))
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    monkeypatch.setattr("ops.recovery.reaper.notify", lambda *arguments: None)
    return Settings.load()


@pytest.fixture
def prefect(prefect_server: None) -> Iterator[Any]:
    """A client of a server with no limit tag:gpu."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as prefect:
        with contextlib.suppress(ObjectNotFound):
            prefect.delete_global_concurrency_limit_by_name(LIMIT)
        yield prefect


@pytest.fixture
def lease(prefect: Any) -> Callable[[str], UUID]:
    """lease(state): a slot leased by a task of a flow run in that state. Returns the flow run's id."""
    from prefect import flow, states, task
    from prefect.client.schemas.objects import ConcurrencyLeaseHolder

    @flow
    def some_flow() -> None:
        return

    @task
    def some_task() -> None:
        return

    def take(state: str) -> UUID:
        run = prefect.create_flow_run(some_flow, state=states.Running())
        made = prefect.create_task_run(some_task, flow_run_id=run.id, dynamic_key="0", state=states.Pending())
        prefect.increment_concurrency_slots_with_lease(
            names=[LIMIT],
            slots=1,
            mode="concurrency",
            lease_duration=60,
            holder=ConcurrencyLeaseHolder(type="task_run", id=made.id),
        )
        if state != "Running":
            prefect.set_flow_run_state(run.id, getattr(states, state)(), force=True)
        return UUID(str(run.id))

    return take


def _one(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_missing_limit_is_created(prefect: Any) -> None:
    """Without it Prefect would let everything start."""
    finding = _one(examine_slots(prefect, 2))
    assert "no limit tag:gpu" in finding.text
    assert finding.mend
    finding.mend()
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 2
    assert list(examine_slots(prefect, 2)) == []
    assert not ensure_limit(prefect, 5)  # one that is there is the user's
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 2


def test_no_limit_is_made_on_a_temporary_server() -> None:
    """Nobody collects a dead holder's lease there."""
    from types import SimpleNamespace

    from prefect.client.base import ServerType

    assert not ensure_limit(SimpleNamespace(server_type=ServerType.EPHEMERAL), 1)  # type: ignore[arg-type]


def test_slots_that_nobody_leased_are_freed(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """As a server that forgot its leases leaves them; what is leased stays counted."""
    ensure_limit(prefect, 3)
    lease("Running")
    assert list(examine_slots(prefect, 3)) == []
    set_active(prefect, 3)
    finding = _one(examine_slots(prefect, 3))
    assert "counts 3 slots as taken, but only 1 have a lease" in finding.text
    assert finding.mend
    finding.mend()
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1
    assert list(examine_slots(prefect, 3)) == []


@pytest.mark.parametrize("state", ["Crashed", "Cancelled", "Failed"])
def test_a_dead_holder_s_lease_is_taken_from_it(prefect: Any, lease: Callable[[str], UUID], state: str) -> None:
    """Its flow run has ended; the server would wait for the lease to run out."""
    ensure_limit(prefect, 2)
    lease(state)
    finding = _one(examine_slots(prefect, 2))
    assert f"({state})" in finding.text
    assert finding.mend
    finding.mend()
    slots = read_slots(prefect)
    assert slots is not None
    assert (slots.active, slots.holders) == (0, {})


def test_a_living_holder_s_lease_is_left(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """Leases are revoked all or none: beside a living one the dead one runs out by itself."""
    ensure_limit(prefect, 2)
    lease("Crashed")
    living = lease("Running")
    finding = _one(examine_slots(prefect, 2))
    assert finding.mend is None
    assert "by itself" in finding.text
    slots = read_slots(prefect)
    assert slots is not None
    assert living in {run.id for run in slots.holders.values() if run}


def test_the_watcher_mends_slots_at_the_second_look(
    prefect: Any, settings: Settings, lease: Callable[[str], UUID]
) -> None:
    """A slot is counted a moment before its lease is there: once is no reason."""
    ensure_limit(prefect, 2)
    set_active(prefect, 2)
    watcher = Watcher(settings, 2)
    assert watcher.check() == []
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).active_slots == 2
    (line,) = watcher.check()
    assert line.endswith(": mended")
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0
    assert watcher.check() == []


def test_the_watcher_leaves_the_limit_to_people(prefect: Any, settings: Settings) -> None:
    """Somebody who sets it to 0, to stop trainings, has a reason."""
    ensure_limit(prefect, 2)
    set_limit(prefect, 0)
    watcher = Watcher(settings, 2)
    assert watcher.check() == watcher.check() == []
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 0


def test_the_watcher_outlives_its_servers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No Prefect, and an MLflow that does not answer: said once each."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    caplog.set_level("INFO", logger="watch")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        watcher = Watcher(Settings(settings.data_root, "http://127.0.0.1:9"), 1)
        assert watcher.check() == watcher.check() == []
    messages = [record.message for record in caplog.records if record.name == "watch"]
    assert len([m for m in messages if "no Prefect server answers" in m]) == 1
    assert len([m for m in messages if m.startswith("MLflow")]) == 1


@pytest.fixture
def left(settings: Settings) -> Iterator[int]:
    """The pid of a child that has a device's lock from a run that died."""
    command = [sys.executable, "-c", LEFT, str(settings.device_locks)]
    child = int(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    yield child
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def waiting(settings: Settings, left: int) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """waiting(): kill that child, and a run that waits for the device takes it. Returns the run's process."""
    command = [sys.executable, "-c", WAITS, str(settings.device_locks)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert "waiting for cpu" in run.stdout.readline()

    def take() -> subprocess.Popen[str]:
        os.kill(left, signal.SIGKILL)
        while run.stdout and run.stdout.readline() != "held\n":
            assert run.poll() is None
        return run

    yield take
    run.kill()
    run.communicate()


def test_a_device_left_to_a_child(settings: Settings, left: int) -> None:
    """Named with the child's number and command, and ended with --fix: nobody waits for its result."""
    finding = _one(iter(examine(settings, 1, None)))
    assert finding.text.startswith(f"cpu is held by pid {left} (")
    assert "time.sleep(100)" in finding.text
    assert "left behind by a run that dies" in finding.text
    assert finding.mend
    finding.mend()
    assert not Path(f"/proc/{left}").exists() or identify_process(left).started == ""
    assert examine(settings, 1, None) == []


def test_who_has_taken_the_device_since_is_left_alone(
    settings: Settings, waiting: Callable[[], subprocess.Popen[str]]
) -> None:
    """The child that was named is gone: there is nothing to end, and the run that waited has the device."""
    finding = _one(iter(examine(settings, 1, None)))
    run = waiting()
    assert finding.mend
    finding.mend()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.5)


def test_who_takes_the_device_meanwhile_is_not_named(
    settings: Settings, waiting: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the lock and the one at its holders: they are not those that the dead run left."""
    looks: list[int] = []

    def read_locks(directory: Path) -> list[LockState]:
        locks = lock.read_locks(directory)
        if locks and not looks:
            looks.append(waiting().pid)
        return locks

    monkeypatch.setattr(doctor, "read_locks", read_locks)
    assert examine(settings, 1, None) == []
    assert looks


def test_a_lock_s_old_text_is_no_finding(settings: Settings) -> None:
    """A dead run's name in a file that nobody locks says nothing: the kernel has freed it."""
    dead = "import sys; from pathlib import Path; from ops.machine.lock import exclusive as e; import os\n"
    dead += "with e(Path(sys.argv[1]), 'cpu', 'dead', print): os._exit(1)"
    subprocess.run([sys.executable, "-c", dead, str(settings.device_locks)], check=False)
    assert "dead" in (settings.device_locks / "cpu.lock").read_text()
    assert examine(settings, 1, None) == []


def test_a_trainer_that_prefect_gave_up(prefect: Any, settings: Settings, lease: Callable[[str], UUID]) -> None:
    """Crashed for Prefect, alive for the kernel: told with the command that ends it well, and left alone."""
    ensure_limit(prefect, 1)
    run = lease("Crashed")
    with exclusive(settings.device_locks, "cpu", "given up", print, flow_run_id=str(run)):
        (finding,) = [f for f in examine(settings, 1, prefect) if "given up" in f.text]
    assert "Crashed" in finding.text
    assert f"kill {os.getpid()}" in finding.text
    assert finding.mend is None


def test_a_run_that_is_no_more(settings: Settings) -> None:
    """RUNNING in MLflow, its process dead: closed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify_process(process.pid)
    with tracked_run(settings, "stale", {}, {}) as run:
        set_tags(run, {PROCESS_TAG: identity.to_json()})
        assert examine(settings, 1, None) == []
        process.communicate(b"\n")
        finding = _one(iter(examine(settings, 1, None)))
        assert "MLflow run stale is RUNNING and should be KILLED" in finding.text
        assert finding.mend
        finding.mend()
        assert client(run.tracking_uri).get_run(run.run_id).info.status == "KILLED"
        assert examine(settings, 1, None) == []


def test_the_server_s_settings(prefect: Any, settings: Settings) -> None:
    """The automation is installed, once; leases in memory and a missing worker are told. The harness has both."""
    from ops.recovery.zombies import NAME, ensure_zombie_automation

    for automation in prefect.read_automations_by_name(NAME):
        prefect.delete_automation(automation.id)
    ensure_limit(prefect, 1)
    found = {finding.text.split(" ")[1]: finding for finding in examine(settings, 1, prefect)}
    texts = " | ".join(finding.text for finding in found.values())
    assert "keeps leases in memory" in texts
    assert "no worker of the pool gpu is online" in texts
    (missing,) = [finding for finding in found.values() if NAME in finding.text]
    assert missing.mend
    missing.mend()
    assert not ensure_zombie_automation()
    assert not [finding for finding in examine(settings, 1, prefect) if NAME in finding.text]
    (automation,) = prefect.read_automations_by_name(NAME)
    prefect.pause_automation(automation.id)
    assert [finding for finding in examine(settings, 1, prefect) if NAME in finding.text]
    assert ensure_zombie_automation()
    assert len(prefect.read_automations_by_name(NAME)) == 1


def test_the_command_tells_and_mends(
    prefect: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a finding; status 1 while something is wrong, 0 when all is well."""
    monkeypatch.setattr(doctor, "_server", lambda prefect: iter(()))  # the harness keeps leases in memory
    monkeypatch.setenv("FINETUNE_GPUS", "2")
    ensure_limit(prefect, 1)
    set_active(prefect, 1)
    assert main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("[--fix mends it]") for line in lines)
    assert main(["--fix"]) == 0
    assert "[mended]" in capsys.readouterr().out
    limit = prefect.read_global_concurrency_limit_by_name(LIMIT)
    assert (limit.limit, limit.active_slots) == (2, 0)
    assert main([]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["FINETUNE_GPUS", "FINETUNE_SECURE", "FINETUNE_MLFLOW_PORT"])
def test_a_setting_that_cannot_be_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "many")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(f"{name}=many: ")


def test_a_limit_for_more_machines_is_left(
    prefect: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell without FINETUNE_GPUS knows this machine's GPUs only: it is told, and nothing is changed."""
    monkeypatch.setattr(doctor, "_server", lambda prefect: iter(()))
    monkeypatch.delenv("FINETUNE_GPUS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ensure_limit(prefect, 3)
    assert main(["--fix"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("- the limit tag:gpu is 3, for 1 GPUs of this machine")
    assert "mend" not in line
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 3
    monkeypatch.setenv("FINETUNE_GPUS", "3")
    assert main([]) == 0


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both servers of a secured profile, to one without the password: 401 to everything but the health check."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/health") else 401)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
        threading.Thread(target=server.serve_forever).start()
        with temporary_settings({PREFECT_API_URL: f"{url}/api"}):
            yield url
        server.shutdown()


def test_a_password_is_asked_for(settings: Settings, locked: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each server by a sentence that says where the password is; make deploy says the same."""
    first = f"requires a password: run `. {settings.data_root}/server/client.env` first"
    assert main(["--fix"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [f"- Prefect at {locked}/api {first}", f"- MLflow at {locked} {first}"]
    assert deploy.main() == 1
    assert capsys.readouterr().err == f"Prefect at {locked}/api {first}\n"


def test_make_doctor_knows_the_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of make up, unless addresses are set."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PREFECT_API_URL $MLFLOW_TRACKING_URI"\n')
    (tmp_path / "python").chmod(0o755)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "FINETUNE_PREFECT_PORT", "FINETUNE_MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)

    def told(*settings: str) -> str:
        command = [*MAKE, f"BIN={tmp_path}", "doctor", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if line.startswith("http"))

    assert told() == "http://127.0.0.1:4200/api http://127.0.0.1:5000"
    monkeypatch.setenv("FINETUNE_PREFECT_PORT", "4201")
    assert told("FINETUNE_MLFLOW_PORT=5001") == "http://127.0.0.1:4201/api http://127.0.0.1:5001"
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    assert told() == "http://elsewhere/api http://127.0.0.1:5000"


def test_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting, else the GPUs that are there, at least one; nonsense is named."""
    monkeypatch.delenv("FINETUNE_GPUS", raising=False)
    monkeypatch.setattr("ops.servers.count_gpus", lambda: 0)
    assert gpu_count() == 1
    monkeypatch.setattr("ops.servers.count_gpus", lambda: 4)
    assert gpu_count() == 4
    monkeypatch.setenv("FINETUNE_GPUS", "2")
    assert gpu_count() == 2
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("FINETUNE_GPUS", wrong)
        with pytest.raises(ValueError, match="FINETUNE_GPUS"):
            gpu_count()
