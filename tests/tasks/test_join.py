"""Two machines in one training: two torchruns on this one, which meet at an address of the loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import free_ports, wait_for
from world import World

pytestmark = pytest.mark.slow
SETTINGS = {"GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Prefect's server and the environment of the first machine."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with World(tmp_path, FINETUNE_NODES="2", FINETUNE_RENDEZVOUS=address, **SETTINGS) as made:
        made.start_prefect()
        yield made


def _join(world: World, number: int = 1) -> subprocess.Popen[str]:
    """The other machine, which has device locks of its own."""
    world.processes["join"] = process = subprocess.Popen(
        [sys.executable, "-m", "tasks.join", world.environment["FINETUNE_RENDEZVOUS"], str(number)],
        cwd=world.base, env=world.environment | {"FINETUNE_LOCKS": str(world.base / "others")},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    return process


def test_two_machines_train_as_one_process(world: World) -> None:
    """Two ranks on the first and two on the second; the losses are those of one process but for rounding."""
    parameters = {"max_steps": 12, "eval_freq": 4}
    other = _join(world)
    output = world.run({**parameters, "gpus": 2})
    assert "Completed" in output.splitlines()[-1]
    said, _ = other.communicate(timeout=60)
    assert other.returncode == 0, said
    assert "trains on cpu, cpu" in said
    assert "the flow run has ended" in said
    together = _losses(output)
    alone = _losses(world.run(parameters, FINETUNE_NODES="1"))
    assert len(together) == 4
    assert together == pytest.approx(alone, abs=2e-4)


def _losses(output: str) -> list[float]:
    """The validation losses in a run's log."""
    return [
        float(line.rpartition("validation loss ")[2]) for line in output.splitlines() if ", validation loss" in line
    ]


def test_a_machine_that_leaves_stops_the_training_with_a_checkpoint(world: World) -> None:
    """SIGTERM to it: all ranks stop after the same step, and the flow tries again when a machine joins again."""
    other = _join(world)
    run = world.begin({"max_steps": 400, "epochs": 100, "eval_freq": 1000, "gpus": 1})
    wait_for("a hundred steps", lambda: len(world.journal()) > 100, 240)
    other.send_signal(signal.SIGTERM)
    said, _ = other.communicate(timeout=60)
    assert other.returncode == 0, said
    again = _join(world)
    output = world.finish(run)
    assert "Completed" in output.splitlines()[-1], output[-3000:]
    assert "stopped on request after step" in output
    assert "this training was resumed at step" in output
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0, said


def test_a_wrong_number_is_named(world: World) -> None:
    """The first machine has the number 0; nothing is started."""
    other = _join(world, 2)
    run = world.begin({"max_steps": 4, "gpus": 1})
    assert other.stdout is not None
    lines: list[str] = []
    while not any("is not between" in line for line in lines):
        lines.append(other.stdout.readline())
        assert other.poll() is None
    assert lines[-1] == "machine 2 is not between 1 and 1: the first one has the number 0\n"
    world.kill("run")
    assert other.wait(60) == 0
    assert run.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_wait_for_a_flow_run_ends_by_a_signal(number: signal.Signals) -> None:
    """At once, and not when the first machine has been waited for in vain."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.join", f"127.0.0.1:{port}", "1"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"machine 1 waits for a flow run at 127.0.0.1:{port}\n"
        time.sleep(2)  # torch is imported and tries to connect
        process.send_signal(number)
        assert process.wait(10) == -number
    finally:
        process.kill()


def test_no_flow_run_is_one_sentence() -> None:
    """After the time in which one may begin, which is shorter here."""
    (port,) = free_ports(1)
    code = (
        "import sys, datetime; from tasks import join, nodes; nodes._CONNECT = datetime.timedelta(seconds=3);"
        f"sys.exit(join.main(['127.0.0.1:{port}', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"no flow run was found at 127.0.0.1:{port}, which FINETUNE_RENDEZVOUS names: " in done.stderr
    assert "Traceback" not in done.stderr
