"""The doctor on a real Prefect server: its findings, and what it mends."""

from __future__ import annotations

import contextlib
import os
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

from ops.machine import lock_file
from ops.machine.lock import exclusive
from ops.machine.lock_file import LockState
from ops.machine.process import identify_process
from ops.recovery import doctor
from ops.recovery.doctor import Finding, examine, examine_slots, main
from ops.recovery.limits import LIMIT, ensure_limit, read_slots, set_active
from ops.settings import Settings
from ops.stack import deploy
from ops.tracking.connection import client
from ops.tracking.runs import PROCESS_TAG, set_tags, tracked_run

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


def _one(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_missing_limit_is_created(prefect: Any) -> None:
    """Without it Prefect would not limit the number of trainings."""
    finding = _one(examine_slots(prefect, 2))
    assert "no limit tag:gpu" in finding.text
    assert finding.mend
    finding.mend()
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 2
    assert list(examine_slots(prefect, 2)) == []
    assert not ensure_limit(prefect, 5)  # an existing limit is the user's choice
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 2


def test_no_limit_is_made_on_a_temporary_server() -> None:
    """Such a server does not free the lease of a dead task."""
    from types import SimpleNamespace

    from prefect.client.base import ServerType

    assert not ensure_limit(SimpleNamespace(server_type=ServerType.EPHEMERAL), 1)  # type: ignore[arg-type]


def test_taken_slots_without_a_lease_are_freed(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """A server that lost its leases leaves them; slots with a lease stay counted."""
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
def test_the_lease_of_a_dead_task_is_revoked(prefect: Any, lease: Callable[[str], UUID], state: str) -> None:
    """Its flow run has ended; otherwise the server would wait until the lease expires."""
    ensure_limit(prefect, 2)
    lease(state)
    finding = _one(examine_slots(prefect, 2))
    assert f"({state})" in finding.text
    assert finding.mend
    finding.mend()
    slots = read_slots(prefect)
    assert slots is not None
    assert (slots.active, slots.holders) == (0, {})


def test_the_lease_of_a_living_task_is_kept(prefect: Any, lease: Callable[[str], UUID]) -> None:
    """Only all leases can be revoked: with a living task among them, that of the dead one expires by itself."""
    ensure_limit(prefect, 2)
    lease("Crashed")
    living = lease("Running")
    finding = _one(examine_slots(prefect, 2))
    assert finding.mend is None
    assert "by itself" in finding.text
    slots = read_slots(prefect)
    assert slots is not None
    assert living in {run.id for run in slots.holders.values() if run}


@pytest.fixture
def left(settings: Settings) -> Iterator[int]:
    """The pid of a child that inherited a device's lock from a run that died."""
    command = [sys.executable, "-c", LEFT, str(settings.device_locks)]
    child = int(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    yield child
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


@pytest.fixture
def waiting(settings: Settings, left: int) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """waiting(): kill that child, so that a run that waits for the device gets it. Returns the run's process."""
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


def test_a_child_of_a_dead_run_that_holds_a_device_is_ended(settings: Settings, left: int) -> None:
    """The finding names the child's pid and command; --fix ends it, because no run waits for its result."""
    finding = _one(iter(examine(settings, 1, None)))
    assert finding.text.startswith(f"cpu is held by pid {left} (")
    assert "time.sleep(100)" in finding.text
    assert "left behind by a run that dies" in finding.text
    assert finding.mend
    finding.mend()
    assert not Path(f"/proc/{left}").exists() or identify_process(left).started == ""
    assert examine(settings, 1, None) == []


def test_a_run_that_got_the_device_since_is_not_ended(
    settings: Settings, waiting: Callable[[], subprocess.Popen[str]]
) -> None:
    """The named child has ended meanwhile, and a run that waited has the device."""
    finding = _one(iter(examine(settings, 1, None)))
    run = waiting()
    assert finding.mend
    finding.mend()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.5)


def test_a_run_that_gets_the_device_meanwhile_is_not_named(
    settings: Settings, waiting: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the lock after its state was read and before its holders are: they are no children of the dead run."""
    looks: list[int] = []

    def read_locks(directory: Path) -> list[LockState]:
        locks = lock_file.read_locks(directory)
        if locks and not looks:
            looks.append(waiting().pid)
        return locks

    monkeypatch.setattr(doctor, "read_locks", read_locks)
    assert examine(settings, 1, None) == []
    assert looks


def test_the_content_of_a_free_lock_is_no_finding(settings: Settings) -> None:
    """The file still names the dead run, but the kernel has freed its lock."""
    dead = "import sys; from pathlib import Path; from ops.machine.lock import exclusive as e; import os\n"
    dead += "with e(Path(sys.argv[1]), 'cpu', 'dead', print): os._exit(1)"
    subprocess.run([sys.executable, "-c", dead, str(settings.device_locks)], check=False)
    assert "dead" in (settings.device_locks / "cpu.lock").read_text()
    assert examine(settings, 1, None) == []


def test_a_living_run_that_is_crashed_in_prefect(
    prefect: Any, settings: Settings, lease: Callable[[str], UUID]
) -> None:
    """Its process lives and holds the device: the finding has the command that ends it, and nothing is mended."""
    ensure_limit(prefect, 1)
    run = lease("Crashed")
    with exclusive(settings.device_locks, "cpu", "given up", print, flow_run_id=str(run)):
        (finding,) = [f for f in examine(settings, 1, prefect) if "given up" in f.text]
    assert "Crashed" in finding.text
    assert f"kill {os.getpid()}" in finding.text
    assert finding.mend is None


def test_a_run_of_a_dead_process_is_closed(settings: Settings) -> None:
    """RUNNING in MLflow although its process is dead."""
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
    """The automation is installed once; leases in memory and a missing worker are findings on the test's server."""
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


def test_the_command_prints_and_mends(
    prefect: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each finding; exit status 1 with findings, 0 without."""
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
def test_a_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "many")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(f"{name}=many: ")


def test_a_limit_for_more_machines_is_left(
    prefect: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without FINETUNE_GPUS only this machine's GPUs are known: a finding, but the limit is not changed."""
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
    """A server that answers like both servers with SECURE=1 without the password: 401 except to health checks."""
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


def test_a_required_password_is_named(settings: Settings, locked: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For each server a line that names the file with the password; make deploy prints the same."""
    first = f"requires a password: run `. {settings.data_root}/server/client.env` first"
    assert main(["--fix"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [f"- Prefect at {locked}/api {first}", f"- MLflow at {locked} {first}"]
    assert deploy.main() == 1
    assert capsys.readouterr().err == f"Prefect at {locked}/api {first}\n"


def test_doctor_knows_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults are the ports of make up; addresses in the environment are kept."""
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "FINETUNE_PREFECT_PORT", "FINETUNE_MLFLOW_PORT"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, ops.recovery.doctor as doctor\n"
        "from flows.command_line import dispatch\n"
        "doctor.main = lambda given: print(os.environ['PREFECT_API_URL'], os.environ['MLFLOW_TRACKING_URI'])\n"
        "dispatch(['doctor'])"
    )

    def told() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    assert told() == "http://127.0.0.1:4200/api http://127.0.0.1:5000"
    monkeypatch.setenv("FINETUNE_PREFECT_PORT", "4201")
    monkeypatch.setenv("FINETUNE_MLFLOW_PORT", "5001")
    assert told() == "http://127.0.0.1:4201/api http://127.0.0.1:5001"
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    assert told() == "http://elsewhere/api http://127.0.0.1:5001"
