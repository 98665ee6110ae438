"""The rows of the table in docs/operations.md: kill -9 and signals with real servers and a real worker.

The device lock "cpu" stands for that of a GPU. Prefect and MLflow must agree on the end of every run.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import LONG, SHORT, Run, Webhook
from installation import Installation
from made_up import BIN, wait_for

from ops.machine.lock_file import read_locks
from ops.recovery.zombies import HEARTBEAT_SECONDS, NAME

pytestmark = pytest.mark.slow
_PIDFD_GETFD = 438  # the system call's number, on every architecture


def test_kill_9_of_the_holder_lets_the_next_one_in(
    platform: Installation, submit: Callable[..., Run], webhook: Webhook
) -> None:
    """Two deployments take turns: the waiting run shows whom it waits for, states agree, and one trains at a time."""
    first = submit({**LONG, "seed": 1})
    first.wait_until_it_trains()
    parameters = {**_tiny(platform), **SHORT, "seed": 2}
    command = platform.run(*(f"{k}={json.dumps(v)}" for k, v in parameters.items()), deployment="finetune/124m")
    try:
        running = {"flow_runs": {"state": {"name": {"any_": ["WaitingForGpu"]}}}}
        (found,) = wait_for("a waiting run", lambda: platform.api("/flow_runs/filter", running), 90)
        second = Run(platform, found["id"])
        message = second.state["message"]
        assert message.startswith("waiting for cpu, held by ")
        assert first.prefect["name"] in message
        assert f"pid {first.process.pid}" in message
        assert first.prefect["name"] in second.artifact("waiting-for-gpu")
        wait_for("the log line", lambda: message in second.logs, 15)
        assert second.state["type"] == "RUNNING"
        time.sleep(3)
        assert second.losses == []

        killed = first.kill()
        first.wait_for_state("Crashed", 20)
        print(f"Crashed after {time.time() - killed:.1f} s")
        first.wait_for_both("CRASHED", "KILLED", 45)
        print(f"KILLED after {time.time() - killed:.1f} s")
        wait_for("no process of it", lambda: not platform.descendants("PREFECT__FLOW_RUN_ID", first.id), 10)
        last = json.loads((platform.training(1) / "metrics.jsonl").read_text().splitlines()[-1])["time"]
        wait_for("a step of the second", lambda: second.losses, 95)
        began = second.losses[0].timestamp / 1000
        print(f"the next one trains after {began - killed:.1f} s")
        assert began - killed <= 90
        assert began * 1000 > last
        second.wait_for_both("COMPLETED", "FINISHED", 200)
        assert re.fullmatch(r"Over: waited \d+ s\.", second.artifact("waiting-for-gpu"))
        assert "cpu is free: going on" in second.logs
    finally:
        command.kill()
    about = [text for text in webhook.texts if first.prefect["name"] in text]
    assert len(about) == 1
    assert "crashed" in about[0]
    assert first.mlflow.info.run_id in about[0]
    assert first.id in about[0]
    assert "crashed" in first.artifact("notice")
    assert platform.api("/v2/concurrency_limits/tag:gpu")["active_slots"] == 0
    _links_lead_both_ways(second)


def _tiny(platform: Installation) -> dict[str, Any]:
    return next(d["parameters"] for d in platform.api("/deployments/filter", {}) if d["name"] == "tiny")


def _links_lead_both_ways(run: Run) -> None:
    assert run.id in run.mlflow.data.tags["prefect.flow_run_url"]
    assert run.id in run.mlflow.data.tags["mlflow.note.content"]
    assert run.mlflow.info.run_id in run.artifact("mlflow-run")


def test_a_living_child_keeps_the_device(platform: Installation, submit: Callable[..., Run]) -> None:
    """A flow is killed while its child may still compute: states agree, and the next run waits.

    It waits through a restart of Prefect's server, until the doctor ends the child.
    """
    first = submit({**LONG, "seed": 3})
    first.wait_until_it_trains()
    child = _start_with_its_lock(first.process.pid, Path(platform.environment["FINETUNE_LOCKS"]) / "cpu.lock")
    try:
        first.kill()
        first.wait_for_both("CRASHED", "KILLED", 45)
        run = submit({**SHORT, "seed": 3})
        message = run.wait_for_state("WaitingForGpu", 90)["message"]
        assert f"held by pid {child.pid}, left behind by {first.prefect['name']} (pid " in message
        platform.kill("prefect")
        time.sleep(5)
        platform.start_prefect()
        assert run.state["name"] == "WaitingForGpu"
        assert "train/loss" not in run.mlflow.data.metrics

        doctor = platform.command(str(BIN / "python"), "-m", "ops.recovery.doctor")
        output, _ = doctor.communicate(timeout=90)
        assert doctor.returncode == 1
        assert f"cpu is held by pid {child.pid}" in output
        assert f"left behind by {first.prefect['name']}" in output
        assert child.poll() is None  # reported, but not ended
        doctor = platform.command(str(BIN / "python"), "-m", "ops.recovery.doctor", "--fix")
        output, _ = doctor.communicate(timeout=90)
        print(output)
        assert "[mended]" in output
        child.wait(10)
        run.wait_for_both("COMPLETED", "FINISHED", 300)
    finally:
        child.kill()
        child.wait()


def _start_with_its_lock(pid: int, lock: Path) -> subprocess.Popen[bytes]:
    """A process that holds a running flow's lock, as a child does that inherited it."""
    number = next(int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir() if _leads_to(link, lock))
    flow = os.pidfd_open(pid)
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, flow, number, 0)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[descriptor])
    finally:
        os.close(descriptor)
        os.close(flow)


def _leads_to(link: Path, file: Path) -> bool:
    try:
        return os.path.samefile(link, file)
    except FileNotFoundError:  # closed meanwhile
        return False


def test_an_exception_ends_both_sides(platform: Installation, submit: Callable[..., Run], webhook: Webhook) -> None:
    """In a training, which holds the device: the device is freed, both sides have FAILED, and a notice is sent."""
    run = submit({**SHORT, "learning_rate": 1e6, "weight_decay": 1e6, "seed": 15})
    run.wait_for_both("FAILED", "FAILED", 120)
    print(run.state["message"])
    assert "step" in run.state["message"]
    wait_for("the notice", lambda: [t for t in webhook.texts if f"failed: {run.prefect['name']}" in t], 10)
    (notice,) = [text for text in webhook.texts if run.prefect["name"] in text]
    assert run.id in notice
    assert run.mlflow.info.run_id in notice
    (device,) = [lock for lock in read_locks(Path(platform.environment["FINETUNE_LOCKS"])) if lock.what == "cpu"]
    assert not device.held
    assert platform.api("/v2/concurrency_limits/tag:gpu")["active_slots"] == 0


def test_a_run_outlives_a_restart_of_prefect_s_server(platform: Installation, submit: Callable[..., Run]) -> None:
    """The server is down for 10 s during a training. A waiting run goes on waiting, and trains afterwards."""
    first = submit({**SHORT, "epochs": 1000, "max_steps": 1000, "eval_freq": 900, "seed": 4})
    first.wait_until_it_trains()
    second = submit({**SHORT, "seed": 5})
    second.wait_for_state("WaitingForGpu", 90)
    platform.kill("prefect")
    time.sleep(10)
    assert not first.process.is_dead
    platform.start_prefect()
    assert first.state["type"] == "RUNNING"
    assert second.losses == []
    first.wait_for_both("COMPLETED", "FINISHED", 500)
    second.wait_for_both("COMPLETED", "FINISHED", 300)
    assert [point.step for point in first.losses] == list(range(1, 1001))
    assert second.losses[0].timestamp > first.losses[-1].timestamp


def test_cancel_and_sigterm_end_a_training_with_a_checkpoint(
    platform: Installation, submit: Callable[..., Run], webhook: Webhook
) -> None:
    """The process ends within 30 s, both sides have its end, and the next run goes on at its last step."""
    parameters = {**SHORT, "epochs": 1000, "max_steps": 1200, "eval_freq": 1100, "seed": 6}
    steps = []
    for how, prefect in (("cancel", "CANCELLED"), ("SIGTERM", "CRASHED")):
        run = submit(parameters)
        run.wait_until_it_trains()
        pid, began = run.process.pid, time.time()
        if how == "cancel":
            done = platform.command(str(BIN / "prefect"), "flow-run", "cancel", run.id)
            output, _ = done.communicate(timeout=60)
            assert done.returncode == 0, output
            began = time.time()
        else:
            began = run.kill(signal.SIGTERM)
        wait_for("the end of the trainer", lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30)
        print(f"{how}: the trainer is gone after {time.time() - began:.1f} s")
        run.wait_for_both(prefect, "KILLED", 30)
        print(f"{how}: both sides after {time.time() - began:.1f} s, {run.state['message']}")
        step = max(int(path.name.removeprefix("step-")) for path in platform.training(6).glob("step-*"))
        assert step not in (0, 1100)
        steps.append(step)
        assert any(run.prefect["name"] in text for text in webhook.texts) == (how == "SIGTERM")
    assert 0 < steps[0] < steps[1] < 1200
    run = submit(parameters)
    run.wait_for_both("COMPLETED", "FINISHED", 500)
    tasks = platform.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run.id]}}})
    (train,) = [task for task in tasks if task["name"].startswith("train-")]
    logs = platform.api("/logs/filter", {"logs": {"task_run_id": {"any_": [train["id"]]}}})
    assert f"this training was resumed at step {steps[1]}" in [line["message"] for line in logs]
    assert [point.step for point in run.losses] == list(range(1, 1201))


def test_a_training_outlives_mlflow(platform: Installation, submit: Callable[..., Run]) -> None:
    """MLflow is killed during a training and started later: no point is missing, and none is there twice."""
    run = submit({**SHORT, "epochs": 1000, "max_steps": 1000, "eval_freq": 900, "seed": 7})
    run.wait_until_it_trains()
    platform.kill("mlflow")
    time.sleep(8)
    assert run.state["name"] == "Running"
    platform.start_mlflow()
    run.wait_for_both("COMPLETED", "FINISHED", 500)
    assert [point.step for point in run.losses] == list(range(1, 1001))


def test_a_run_outlives_its_worker(platform: Installation, submit: Callable[..., Run]) -> None:
    """kill -9 of the worker alone: the flow completes."""
    run = submit({**SHORT, "epochs": 1000, "max_steps": 300, "seed": 9})
    run.wait_until_it_trains()
    platform.kill("worker")
    try:
        run.wait_for_both("COMPLETED", "FINISHED", 300)
    finally:
        platform.start_worker()


def test_a_cancellation_without_a_worker(platform: Installation, submit: Callable[..., Run]) -> None:
    """No worker delivers it: the watcher sends SIGTERM to the process, which saves a checkpoint and ends."""
    run = submit({**LONG, "seed": 14})
    run.wait_until_it_trains()
    platform.kill("worker")
    try:
        platform.command(str(BIN / "prefect"), "flow-run", "cancel", run.id).communicate(timeout=60)
        began = time.time()
        wait_for("the end of the trainer", lambda: run.process.is_dead, 125)
        print(f"the trainer is gone after {time.time() - began:.1f} s")
        run.wait_for_both("CRASHED", "KILLED", 30)
        step = max(int(path.name.removeprefix("step-")) for path in platform.training(14).glob("step-*"))
        assert step > 0
    finally:
        platform.start_worker()


def test_the_watcher_ends_what_died_with_its_worker(
    platform: Installation, submit: Callable[..., Run], webhook: Webhook
) -> None:
    """kill -9 of worker and flow: the watcher sets both ends, within two of its checks."""
    run = submit({**LONG, "seed": 10})
    run.wait_until_it_trains()
    platform.kill("worker")
    try:
        killed = run.kill()
        run.wait_for_both("CRASHED", "KILLED", 65)
        print(f"both sides after {time.time() - killed:.1f} s")
        assert "is gone" in run.state["message"]
    finally:
        platform.start_worker()
    wait_for("the notice", lambda: [t for t in webhook.texts if run.prefect["name"] in t], 10)
    wait_for("the slot", lambda: platform.api("/v2/concurrency_limits/tag:gpu")["active_slots"] == 0, 95)
    print(f"the slot is free after {time.time() - killed:.1f} s")


def test_a_run_that_died_before_it_began(
    platform: Installation, submit: Callable[..., Run], webhook: Webhook
) -> None:
    """kill -9 of worker and flow while the run is Pending and has no MLflow run: the watcher ends it."""
    run = submit({**SHORT, "seed": 16})
    wait_for("Pending", lambda: run.state["type"] == "PENDING", 60)
    platform.kill("worker")
    killed = time.time()
    try:
        for pid in platform.descendants("PREFECT__FLOW_RUN_ID", run.id):
            os.kill(pid, signal.SIGKILL)
        assert run.mlflow is None
        run.wait_for_state("Crashed", 195)
        print(f"Crashed after {time.time() - killed:.1f} s: {run.state['message']}")
        assert "worker" in run.state["message"]
    finally:
        platform.start_worker()
    wait_for("the notice", lambda: [t for t in webhook.texts if run.prefect["name"] in t], 10)


def test_heartbeats_end_what_died_with_everything(platform: Installation, submit: Callable[..., Run]) -> None:
    """Without worker and watcher Prefect's automation ends the flow run; a later watcher closes the MLflow run."""
    run = submit({**LONG, "seed": 11})
    run.wait_until_it_trains()
    platform.kill("worker")
    platform.kill("watch")
    try:
        killed = run.kill()
        run.wait_for_state("Crashed", 3 * HEARTBEAT_SECONDS + 15)
        print(f"Crashed after {time.time() - killed:.1f} s")
        assert run.state["message"].startswith("No heartbeat for 90 s")
        assert run.mlflow.info.status == "RUNNING"
    finally:
        platform.start_watcher()
        platform.start_worker()
    # The watcher's first check is within the 15 s that hooks have; its next one is 30 s later.
    run.wait_for_both("CRASHED", "KILLED", 65)


def test_a_restart_of_the_machine(platform: Installation, submit: Callable[..., Run]) -> None:
    """Everything is killed at once; after servers, worker and watcher have started again, both sides have the end."""
    run = submit({**LONG, "seed": 12})
    run.wait_until_it_trains()
    pid = run.process.pid
    for name in ("worker", "watch", "prefect", "mlflow"):
        platform.kill(name)
    os.kill(pid, signal.SIGKILL)
    time.sleep(3)
    platform.start_prefect()
    platform.start_mlflow()
    began = time.time()
    platform.start_worker()
    platform.start_watcher()
    run.wait_for_both("CRASHED", "KILLED", 65)
    print(f"both sides after {time.time() - began:.1f} s")
    after = submit({**SHORT, "seed": 13})
    after.wait_for_both("COMPLETED", "FINISHED", 300)


def test_the_doctor_finds_nothing(platform: Installation) -> None:
    """After all these tests nothing is wrong, and the webhook's address is in no log and no database."""
    doctor = platform.command(str(BIN / "python"), "-m", "ops.recovery.doctor")
    output, _ = doctor.communicate(timeout=90)
    assert doctor.returncode == 0, output
    assert "all is well" in output
    (automation,) = [a for a in platform.api("/automations/filter", {}) if a["name"] == NAME]
    assert automation["enabled"]
    for path in platform.base.rglob("*"):
        if path.is_file() and path.stat().st_size < 2**28:
            assert b"s3cr3t-path" not in path.read_bytes(), path
