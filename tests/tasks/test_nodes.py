"""Settings of several machines, and the announcement of a job."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import free_ports

from flows.job import Job
from flows.trials import SweepJob
from model.engine.config import TrainConfig
from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import plan_freeze
from ops.machine.gang import Node
from tasks.gang_job import GangJob, read_job, write_job
from tasks.join import _with_passes
from tasks.nodes import Announcement, Nodes, announced, find_store, is_over, read_newest
from tasks.references import ModelRef, TokensRef, TrainingRef


@pytest.fixture
def job() -> GangJob:
    """A job of paths that are not there."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 16}
    training = TrainingRef(
        tokens=TokensRef("/no/tokens", "key", "sha", {"rows": {"train": 3}}, ({"path": "x", "rows": 3},)),
        model=ModelRef("tiny", "/no/base", "/no/base", "embedded", "sha", shape, {"a": "b"}, {}),
        plan=plan_freeze(GPTConfig(**shape), FreezeConfig(num_unfrozen_layers=1)),
        config=TrainConfig(),
        determinants={"device": "cpu"},
        identity="identity",
        directory="/no/training",
    )
    return GangJob(training, 1.5, 2048)


def test_a_job_is_read_as_it_was_written(job: GangJob, tmp_path: Path) -> None:
    """All of it; a damaged file is named."""
    path = tmp_path / "deep" / "job.json"
    write_job(path, job)
    assert read_job(path) == job
    path.write_text(path.read_text().replace("identity", "identify"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged"):
        read_job(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FINETUNE_NODES": "two"}, "FINETUNE_NODES is 'two', and should be the number of machines"),
        ({"FINETUNE_NODES": "0"}, "FINETUNE_NODES is '0'"),
        ({"FINETUNE_NODES": "2"}, "FINETUNE_RENDEZVOUS is '', and should be HOST:PORT"),
        ({"FINETUNE_NODES": "2", "FINETUNE_RENDEZVOUS": "host"}, "FINETUNE_RENDEZVOUS is 'host'"),
        ({"FINETUNE_NODES": "2", "FINETUNE_RENDEZVOUS": "host:65535"}, "and the next one are free"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    """In one sentence that names the variable."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        Job.from_parameters({"model_size": "tiny", "device": "cpu"})


def test_all_processes_of_all_machines_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter gpus in MLflow is their number."""
    parameters: dict[str, Any] = {"model_size": "tiny", "device": "cpu", "gpus": 2}
    assert Job.from_parameters(parameters).logged()["gpus"] == 2
    monkeypatch.setenv("FINETUNE_NODES", "3")
    monkeypatch.setenv("FINETUNE_RENDEZVOUS", "[::1]:4711")
    assert Job.from_parameters(parameters).logged()["gpus"] == 6
    assert Nodes.load() == Nodes(3, "::1", 4711)


def test_one_machine_announces_nothing(job: GangJob) -> None:
    """And needs no port."""
    with announced(job, 2) as node:
        assert node == Node()


def test_a_job_is_announced(job: GangJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine finds the newest one, while it is not over: one that comes late must not wait for old ones."""
    (port,) = free_ports(1)
    monkeypatch.setenv("FINETUNE_NODES", "2")
    monkeypatch.setenv("FINETUNE_RENDEZVOUS", f"127.0.0.1:{port}")
    with announced(job, 2) as node:
        assert node == Node(2, 0, "127.0.0.1", port + 1)
        store = find_store("127.0.0.1", port)
        assert read_newest(store) == (1, Announcement(2, 2, job))
        assert not is_over(store, 1)
    assert is_over(store, 1)
    assert read_newest(store) is None
    with announced(job, 1):
        assert read_newest(store) == (2, Announcement(2, 1, job))
        assert not is_over(store, 2)


def test_a_sweep_trains_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is refused by name."""
    monkeypatch.setenv("FINETUNE_NODES", "2")
    monkeypatch.setenv("FINETUNE_RENDEZVOUS", "host:4711")
    with pytest.raises(ValueError, match=r"^FINETUNE_NODES is for runs of finetune: .*: unset it$"):
        SweepJob.from_parameters({"model_size": "tiny", "device": "cpu", "grid": {"dropout": [0.0]}})


def test_shorter_passes_of_one_machine(job: GangJob) -> None:
    """What this machine's memory holds goes into the next job; a job with shorter ones stays as it is."""
    announced = Announcement(2, 1, job)
    assert _with_passes(announced, None) is announced
    assert _with_passes(announced, 1024).job.micro_batch_tokens == 1024
    assert _with_passes(announced, 4096).job.micro_batch_tokens == 2048
    assert _with_passes(replace(announced, job=replace(job, micro_batch_tokens=None)), 1024).job == replace(
        job, micro_batch_tokens=1024
    )


@pytest.mark.parametrize("arguments", [[], ["host", "1"], ["host:1", "one"], ["host:1", "1", "2"]])
def test_a_wrong_command_line_of_join(arguments: list[str]) -> None:
    """Ends with its usage."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.join", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith("python -m tasks.join HOST:PORT NUMBER, not ")
