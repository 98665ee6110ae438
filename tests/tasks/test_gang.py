"""Runs on several processes of the CPU, each a real one under torchrun, in a flow with real servers."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import ROOT, wait_for

import model.net.device
from ops.machine.gang import GangError
from ops.machine.lock_file import read_locks
from ops.settings import Settings
from ops.tracking.connection import client
from tasks import gang
from tasks.gang import Devices, held_devices
from tasks.resume import RESUMED_TAG
from tasks.scoring import Scoring

TINY: dict[str, Any] = {
    "model_size": "tiny", "dataset": "demo", "num_unfrozen_layers": 2, "validation_share": 0.1, "max_length": 128,
    "max_steps": 12, "batch_size": 8, "learning_rate": 0.002, "eval_freq": 5, "eval_rows": 40, "sample_rows": 6,
    "pass_rows": 6, "max_new_tokens": 16, "precision": "fp32", "device": "cpu", "score_rows": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def flow(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """flow(...): a finished run of the flow in this process, with all runs of the module in one data root."""
    from flows.finetune import finetune

    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_DATA_ROOT", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow/mlflow.db")
        patch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests' / 'helpers'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield lambda **changes: finetune(**{**TINY, **changes})


@pytest.fixture(scope="module")
def alone(flow: Callable[..., Any]) -> Any:
    """The result of a run in one process. Read only."""
    return flow()


def _curve(result: Any, name: str) -> dict[int, float]:
    points = client(result.run.tracking_uri).get_metric_history(result.run.run_id, name)
    assert len({point.step for point in points}) == len(points), "no point is there twice"
    return {point.step: point.value for point in points}


def _params(result: Any) -> dict[str, str]:
    return dict(client(result.run.tracking_uri).get_run(result.run.run_id).data.params)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_two_processes_train_as_one(flow: Callable[..., Any], alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and losses are those of one process but for rounding; the completions are the same.

    Losses and records of one trained model are equal: the same training is scored by two processes and by one.
    """
    monkeypatch.setattr(gang, "_FEWEST_COMPLETIONS", 1)
    shutil.rmtree(Settings.load().base_outputs)  # the ranks would take the base's outputs from there
    both = flow(gpus=2)
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        assert _curve(both, name) == pytest.approx(_curve(alone, name), rel=1e-4)
    assert (_params(alone)["gpus"], _params(both)["gpus"]) == ("1", "2")
    assert {n: v for n, v in _params(both).items() if n != "gpus"} == {
        n: v for n, v in _params(alone).items() if n != "gpus"
    }
    for name, value in both.metrics.items():
        if name.startswith("untuned/"):  # the same model: the same bits
            assert value == alone.metrics[name], name
        else:
            assert value == pytest.approx(alone.metrics[name], rel=1e-3), name


@pytest.mark.slow
def test_ranks_score_as_one_process(
    flow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same checkpoint scored by one process, by two and by three: equal losses, and the same texts.

    So it is where the base's outputs are known, which no rank makes again.
    """
    import tasks.evaluate

    score = gang.score
    seen: list[Any] = []
    with_base: list[Any] = []

    def keep(scoring: Scoring, devices: Devices, gigabytes: float, log: Any) -> Any:
        for count, fewest in ((1, 1), (2, 1), (3, 1), (2, 10**6)):
            monkeypatch.setattr(gang, "_FEWEST_COMPLETIONS", fewest)
            seen.append(score(scoring, Devices(devices.names[:1] * count, devices.descriptors[:1] * count), 1.0, log))
        monkeypatch.setattr(gang, "_FEWEST_COMPLETIONS", 1)
        two = Devices(devices.names[:1] * 2, devices.descriptors[:1] * 2)
        marked = replace(seen[0].base, refusal="made elsewhere")
        with_base.append(score(replace(scoring, base=marked), two, gigabytes, log))
        assert with_base == [replace(seen[0], base=marked)]
        return seen[0]

    monkeypatch.setattr(tasks.evaluate, "score", keep)
    flow(gpus=1, seed=3, sample_rows=None, pass_rows=20, max_steps=4)
    assert len(seen) == 4
    assert len(with_base) == 1
    assert seen[0].tokens
    assert seen[0].tuned.losses != seen[0].base.losses
    assert seen[1:] == [seen[0]] * 3


def test_devices_are_held_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two of a machine's three GPUs, which are made up here; a second run of two waits for both, and says so."""
    monkeypatch.setenv("FINETUNE_LOCKS", str(tmp_path / "locks"))
    three = [torch.device("cuda", index) for index in range(3)]
    for module in (gang, model.net.device):
        monkeypatch.setattr(module, "device_choices", lambda device: three)
    monkeypatch.setattr(gang, "device_key", lambda place: f"gpu {place.index}")
    said: list[str] = []

    class Enough(Exception):
        pass

    def log(message: str) -> None:
        said.append(message)
        raise Enough

    with held_devices("auto", 2, "the first", log) as devices:
        assert devices.names == ("cuda:0", "cuda:1")
        assert len({*devices.descriptors}) == 2
        assert devices.first == "cuda:0"
        with pytest.raises(Enough), held_devices("cuda", 2, "the second", log):
            pass
        with held_devices("auto", 1, "the third", log) as one:
            assert one.names == ("cuda:2",)
            assert not one.need_gang
    (message,) = said
    assert message.startswith("waiting for 2 of 3 devices: gpu 0, held by the first (pid ")
    assert " or gpu 1, held by the first (pid " in message
    assert "gpu 2" not in message
    with held_devices("cuda", "all", "the second", log) as devices:
        assert devices.names == ("cuda:0", "cuda:1", "cuda:2")


def test_a_cpu_stands_for_each_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held once, and each process keeps that lock. It has four processors here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    with held_devices("cpu", 3, "a run", pytest.fail) as devices:
        assert devices.names == ("cpu",) * 3
        assert len({*devices.descriptors}) == 1
        assert devices.need_gang


@pytest.mark.slow
def test_a_rank_without_memory_halves_the_passes_of_all(
    flow: Callable[..., Any], alone: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gang begins again from its checkpoint; no step is missing or twice, and the losses are the same."""
    monkeypatch.setattr(gang, "WORKER", "short_of_memory")
    caplog.set_level(logging.WARNING)
    result = flow(gpus=2, score_rows=10)
    (said,) = [line for line in _warnings(caplog) if "memory" in line]
    assert said.startswith("rank 1 failed: memory of rank 1 does not hold passes of 2,048 tokens")
    assert "all ranks begin again from the last checkpoint" in said
    assert _curve(result, "train/loss") == pytest.approx(_curve(alone, "train/loss"), rel=1e-4)
    assert sorted(_curve(result, "train/loss")) == list(range(1, 13))
    tags = client(result.run.tracking_uri).get_run(result.run.run_id).data.tags
    assert RESUMED_TAG not in tags, "it goes on from no other run"


@pytest.mark.slow
def test_a_signal_ends_the_computation_of_frozen_blocks(
    flow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would take a minute: Ctrl-C in it ends all ranks within seconds, in order."""
    chunks = tmp_path / "chunks"
    monkeypatch.setattr(gang, "WORKER", "slow_to_fill")
    monkeypatch.setenv("CHUNKS", str(chunks))
    caplog.set_level(logging.WARNING)
    sent: list[float] = []

    def interrupt() -> None:
        wait_for("chunks of the training rows", lambda: chunks.read_text().count("\n") > 12, 200)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        flow(gpus=2, seed=12, max_steps=300, score_rows=10)
    print(f"ended after {time.monotonic() - sent[0]:.1f} s, of {chunks.read_text().count(chr(10))} chunks")
    assert time.monotonic() - sent[0] < 15
    assert "stopped: a checkpoint of step" not in caplog.text
    assert any("the same parameters start the training again" in line for line in _warnings(caplog))
    assert not any(lock.held for lock in read_locks(Path(os.environ["FINETUNE_LOCKS"])))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bug", "mistake"])
def test_a_bug_of_a_rank_is_no_mistake(
    flow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """A ValueError of a library is none of the user's, and its traceback is named."""
    import flows.finetune as module

    monkeypatch.setattr(gang, "WORKER", "wrong_rank")
    monkeypatch.setenv("WRONG_RANK", what)
    monkeypatch.setattr(module.train, "retries", 0)
    expected = {
        "bug": (GangError, r"^rank \d failed: invalid literal for int.* \(ValueError; the ranks' logs in .* have"),
        "mistake": (ValueError, r"^rank \d failed: precision 'fp8' is none of"),
    }
    kind, message = expected[what]
    with pytest.raises(kind, match=message):
        flow(gpus=2, seed=11, score_rows=10)


@pytest.mark.slow
def test_a_diverged_training_is_the_same_error(flow: Callable[..., Any]) -> None:
    """A rank's NonFiniteError is raised by the task, and is not tried again."""
    from model.engine.trainer import NonFiniteError

    with pytest.raises(NonFiniteError, match=r"^rank \d failed: .*lower learning_rate|lower the learning rate"):
        flow(gpus=2, learning_rate=1e6, weight_decay=1e6, score_rows=10)


@pytest.mark.slow
def test_a_rank_that_cannot_begin_is_named(
    flow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With torchrun's last words; the lock is free afterwards."""
    import flows.finetune as module

    monkeypatch.setattr(gang, "WORKER", "no_such_module")
    monkeypatch.setattr(module.train, "retries", 0)
    with pytest.raises(GangError, match=r"torchrun ended with the status 1; the last lines of .*torchrun-0.log"):
        flow(gpus=2, seed=9, score_rows=10)
    assert not any(lock.held for lock in read_locks(Path(os.environ["FINETUNE_LOCKS"])))
