"""Checkpoints and resumption: a training killed at any moment and resumed equals an uninterrupted one bitwise."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import flip
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import model as package
from model import GPTModel, freeze_bottom_layers
from model.engine.adamw import AdamW
from model.engine.checkpoint import (
    Snapshot,
    checkpoint_path,
    load_checkpoint,
    load_state,
    load_trained,
    newest_checkpoint,
    prune_checkpoints,
    take_snapshot,
    write_checkpoint,
)
from model.engine.journal import read_journal
from model.engine.saving import CheckpointWriter
from model.engine.state import TrainingState
from model.engine.stepper import build_optimizer
from model.engine.trainer import StepReport, TrainingStoppedError, TrainResult
from model.engine.training import TrainConfig, train
from model.engine.trunk import TrunkCacheConfig
from model.files import sha256_file

CONFIG = TrainConfig(
    epochs=3, max_steps=15, batch_size=8, learning_rate=1e-2, eval_freq=4, warmup_ratio=0.2, precision="fp32"
)


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(**{**vars(CONFIG), **settings})


@pytest.fixture
def fresh(gpt2_dir: Path) -> Callable[[], GPTModel]:
    def load() -> GPTModel:
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, 1)
        return model

    return load


def trained_optimizer(model: GPTModel, steps: int = 2) -> AdamW:
    """An optimizer after some steps on the model."""
    optimizer = build_optimizer(model, CONFIG)
    for _ in range(steps):
        model(torch.randint(300, (2, 20))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def write(directory: Path, model: GPTModel, optimizer: AdamW, step: int, state: dict[str, Any]) -> Path:
    """A checkpoint whose state is complete: the best one is itself."""
    known = TrainingState("", 512, step, 0.5, 0.5, best_step=step, journal_lines=step + 1).to_json()
    return write_checkpoint(directory, take_snapshot(model, optimizer), step, {**known, **state})


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def parameters(model: GPTModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def record(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """The journal without times and speeds."""
    lines = read_journal(directory / "metrics.jsonl")
    timed = ("train/tokens_per_second", "train/mfu")
    return [(line["step"], {k: v for k, v in line["metrics"].items() if k not in timed}) for line in lines]


# The files


def test_files_of_a_checkpoint(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """Safetensors and JSON, no pickle; only trained tensors."""
    model = fresh()
    path = write(tmp_path, model, trained_optimizer(model), 7, {"identity": "me"})
    assert path == tmp_path / "step-00000007" == checkpoint_path(tmp_path, 7)
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "state.json", "trainer.safetensors"]
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            assert reader.keys()
        assert file.read_bytes()[8:9] == b"{"  # neither a pickle nor a zip
    assert json.loads((path / "state.json").read_text())["identity"] == "me"
    trained = {name: p for name, p in parameters(model).items() if name.startswith(("h.2.", "ln_f."))}
    assert same_tensors(load_file(path / "model.safetensors"), trained)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_round_trip_restores_weights_and_moments(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """Weights and moments are restored exactly."""
    model = fresh()
    optimizer = trained_optimizer(model)
    path = write(tmp_path, model, optimizer, 2, {"identity": "me"})
    other = fresh()
    restored = build_optimizer(other, CONFIG)
    load_checkpoint(path, other, restored)
    assert same_tensors(parameters(other), parameters(model))
    names = {p: name for name, p in other.named_parameters()}
    originals = dict(model.named_parameters())
    assert len(restored.state) == len(optimizer.state) == 14
    for parameter, state in restored.state.items():
        want = optimizer.state[originals[names[parameter]]]
        assert same_tensors(state, want)
        assert all(state[key].dtype == want[key].dtype for key in want)
    assert load_state(path)["step"] == 2


def test_further_tensors_of_the_state(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """They are overwritten in place; a checkpoint of a training that has none is refused by name."""
    model = fresh()
    optimizer = trained_optimizer(model)
    scale = torch.tensor(2.0)
    snapshot = take_snapshot(model, optimizer, copy=True, further={"scale": scale})
    scale.fill_(3.0)
    load_checkpoint(write_checkpoint(tmp_path, snapshot, 2, {}), model, optimizer, {"scale": scale})
    assert scale.item() == 2.0
    path = write(tmp_path, model, optimizer, 3, {})
    with pytest.raises(ValueError, match=r"step-00000003.trainer.safetensors has no such scale"):
        load_checkpoint(path, model, optimizer, {"scale": scale})


def test_checkpoint_of_other_parameters_is_refused(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """The error names parameters or shapes that differ; a shape is never broadcast."""
    model = fresh()
    path = write(tmp_path, model, build_optimizer(model, CONFIG), 0, {})
    freeze_bottom_layers(model, 2)
    with pytest.raises(ValueError, match=r"trains other parameters: .*h\.1\."):
        load_trained(path, model)
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "ln_f.bias": torch.zeros(1)}, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["files"]["model.safetensors"] = sha256_file(path / "model.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"ln_f\.bias is \[1\], expected \[32\]"):
        load_trained(path, fresh())
    save_file({**tensors, "ln_f.bias": torch.zeros(32, dtype=torch.int32)}, path / "model.safetensors")
    edit(path, files={**state["files"], "model.safetensors": sha256_file(path / "model.safetensors")})
    with pytest.raises(ValueError, match=r"ln_f\.bias is of the dtype torch\.int32, expected torch\.float32"):
        load_trained(path, fresh())


@pytest.mark.parametrize(
    "change",
    [
        "moment missing",
        "moment of another shape",
        "moment of integers",
        "further tensor missing",
        "further tensor of another shape",
        "further tensor of another dtype",
        "no file",
    ],
)
def test_an_optimizer_s_state_that_does_not_fit_is_refused(
    fresh: Callable[[], GPTModel], tmp_path: Path, change: str
) -> None:
    """Its checksum fits, and it is not what this version writes: one sentence, not KeyError or RuntimeError."""
    model = fresh()
    snapshot = take_snapshot(model, trained_optimizer(model), further={"scale": torch.tensor(2.0)})
    path = write_checkpoint(tmp_path, snapshot, 2, TrainingState("", 512, 2, 0.5, 0.5, 2, 3).to_json())
    file = path / "trainer.safetensors"
    tensors = load_file(file)
    if change == "moment missing":
        del tensors["exp_avg.ln_f.bias"]
    elif change == "moment of another shape":
        tensors["exp_avg.ln_f.bias"] = torch.zeros(1)
    elif change == "moment of integers":
        tensors["exp_avg.ln_f.bias"] = tensors["exp_avg.ln_f.bias"].int()
    elif change == "further tensor missing":
        del tensors["further.scale"]
    elif change == "further tensor of another shape":
        tensors["further.scale"] = torch.zeros(1)
    elif change == "further tensor of another dtype":
        tensors["further.scale"] = torch.tensor(2)
    save_file(tensors, file)
    if change == "no file":
        file.write_bytes(b"")
    state = json.loads((path / "state.json").read_text())
    edit(path, files={**state["files"], "trainer.safetensors": sha256_file(file)})
    with pytest.raises(ValueError, match=r"trainer\.safetensors (is damaged|has no such scale)"):
        load_checkpoint(path, model, build_optimizer(model, CONFIG), {"scale": torch.tensor(0.0)})


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a checkpoint's state.json."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, **changes}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit in the weights": lambda p: flip(p / "model.safetensors", -1),
    "flipped bit in the moments": lambda p: flip(p / "trainer.safetensors", -1),
    "weights cut": lambda p: os.truncate(p / "model.safetensors", 500),
    "moments missing": lambda p: (p / "trainer.safetensors").unlink(),
    "state missing": lambda p: (p / "state.json").unlink(),
    "state cut": lambda p: os.truncate(p / "state.json", 20),
    "state empty": lambda p: os.truncate(p / "state.json", 0),
    "state of another kind": lambda p: (p / "state.json").write_text("null"),
    "state not text": lambda p: (p / "state.json").write_bytes(b"\xff\xfe\x00"),
    "state of a later step": lambda p: edit(p, step=1_000_000_000),
    "state of an earlier step": lambda p: edit(p, step=4),
    "step that is no whole number": lambda p: edit(p, step=8.0),
    "step that is a truth": lambda p: edit(p, step=True),
    "loss that is no number": lambda p: edit(p, best_eval_loss=None),
    "loss that is infinite": lambda p: edit(p, base_eval_loss=math.inf, best_eval_loss=math.inf),
    "best loss above that of the base": lambda p: edit(p, best_eval_loss=9.0),
    "best step in the future": lambda p: edit(p, best_step=9),
    "negative best step": lambda p: edit(p, best_step=-1),
    "fewer lines than steps": lambda p: edit(p, journal_lines=3),
    "passes of no token": lambda p: edit(p, micro_batch_tokens=0),
    "no checksums": lambda p: edit(p, files={}),
    "checksums of another kind": lambda p: edit(p, files=["model.safetensors", "trainer.safetensors"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over(fresh: Callable[[], GPTModel], tmp_path: Path, damage: str) -> None:
    """The checkpoint before it is used, and a warning names the damaged one."""
    model = fresh()
    optimizer = trained_optimizer(model)
    for step in (4, 8):
        write(tmp_path, model, optimizer, step, {"identity": "me"})
    DAMAGES[damage](tmp_path / "step-00000008")
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, "me", warnings.append)
    assert found is not None
    assert found[0] == tmp_path / "step-00000004"
    assert found[1]["step"] == 4
    assert len(warnings) == 1
    assert "step-00000008" in warnings[0]


def test_newest_is_by_number_and_identity(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """The newest checkpoint is used, but never one of another training."""
    model = fresh()
    optimizer = build_optimizer(model, CONFIG)
    for step, identity in ((9, "me"), (10, "me"), (100, "other")):
        write(tmp_path, model, optimizer, step, {"identity": identity})
    found = newest_checkpoint(tmp_path, "me")
    assert found is not None
    assert found[1]["step"] == 10
    assert newest_checkpoint(tmp_path, "third") is None
    assert newest_checkpoint(tmp_path / "absent", "me") is None


def test_strays_of_a_killed_writer_are_removed(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """An incomplete checkpoint under its scratch name is deleted and never read."""
    model = fresh()
    write(tmp_path, model, build_optimizer(model, CONFIG), 4, {"identity": "me"})
    (tmp_path / "step-00000004").rename(tmp_path / ".step-00000008.0123.tmp")
    assert newest_checkpoint(tmp_path, "me") is None
    assert list(tmp_path.iterdir()) == []


def test_prune_keeps_the_named(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """Only the named checkpoints remain; other files are not touched."""
    model = fresh()
    for step in (0, 4, 8, 12):
        write(tmp_path, model, build_optimizer(model, CONFIG), step, {})
    (tmp_path / "metrics.jsonl").touch()
    prune_checkpoints(tmp_path, {4, 12})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000004", "step-00000012"]


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 4 kB: a write fails as on a full disk.

    The limit applies to the whole process, also to pytest's report if that is a file: set it around a write only,
    not to the end of a test.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_the_old_checkpoint(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """The error names file and size; no scratch directory remains, and the checkpoint before it is complete."""
    model = fresh()
    optimizer = trained_optimizer(model)
    write(tmp_path, model, optimizer, 4, {"identity": "me"})
    for step in (4, 8):
        message = rf"cannot write .*step-0000000{step}.*safetensors, [\d,]+ bytes .*too large"
        with pytest.raises(OSError, match=message), full_disk():
            write(tmp_path, model, optimizer, step, {"identity": "me"})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    assert load_state(tmp_path / "step-00000004")["step"] == 4


def test_background_write_has_the_state_at_the_save(
    fresh: Callable[[], GPTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint written in the background has the state at the time of save, though the training goes on.

    The checkpoint before it exists until the new one is complete.
    """
    model = fresh()
    optimizer = trained_optimizer(model)
    released = threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        assert released.wait(60)
        save_file(tensors, path)

    before = {name: p.clone() for name, p in parameters(model).items()}
    moments = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    with CheckpointWriter(tmp_path, model, optimizer, in_background=True) as writer:
        writer.save(4, {"identity": "me"}, keep=[4])
        writer.wait()
        monkeypatch.setattr("model.engine.checkpoint.save_tensors", slow)
        monkeypatch.setattr("model.engine.saving._SECONDS_BETWEEN", 0.0)
        writer.save(8, {"identity": "me"}, keep=[8])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
            for state in optimizer.state.values():
                state["exp_avg"] += 1
        assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["step-00000004"]
        released.set()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"]
    other = fresh()
    restored = build_optimizer(other, CONFIG)
    load_checkpoint(tmp_path / "step-00000008", other, restored)
    assert same_tensors(parameters(other), before)
    originals = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert same_tensors(restored.state[parameter], moments[originals[name]])


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_write_is_raised_later(fresh: Callable[[], GPTModel], tmp_path: Path, in_background: bool) -> None:
    """A failed write is raised when it is waited for, or at the end; the checkpoint before it is complete."""
    model = fresh()
    optimizer = trained_optimizer(model)
    with CheckpointWriter(tmp_path, model, optimizer, in_background) as writer:
        writer.save(4, {"identity": "me"}, keep=[4])

    def save(wait: bool) -> None:
        with CheckpointWriter(tmp_path, model, optimizer, in_background) as writer:
            writer.save(8, {"identity": "me"}, keep=[8])
            if wait:
                writer.wait()
                pytest.fail("the error was not raised")

    for wait in (False, True):
        with pytest.raises(OSError, match="too large"), full_disk():
            save(wait)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_closed_writer_leaves_the_tensors_alone_and_the_waiting_to_the_caller(
    fresh: Callable[[], GPTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next training may use the model during the last write; a failure is raised where one waits for it."""
    model = fresh()
    optimizer = trained_optimizer(model)
    released = threading.Event()

    def slow(tensors: dict[str, Tensor], path: Path) -> None:
        assert released.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr("model.engine.checkpoint.save_tensors", slow)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with CheckpointWriter(tmp_path, model, optimizer, in_background=True) as writer:
        writer.save(4, {"identity": "me"}, keep=[4])
        wait = writer.close()
        freed = weakref.ref(optimizer)
        del optimizer
    assert freed() is None, "its moments take memory that the next training needs"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert not [*tmp_path.glob("step-*")]
    released.set()
    wait()
    assert same_tensors(load_file(tmp_path / "step-00000004" / "model.safetensors"), before)
    monkeypatch.undo()
    with CheckpointWriter(tmp_path, model, trained_optimizer(model), in_background=True) as writer, full_disk():
        writer.save(8, {"identity": "me"}, keep=[8])
        wait = writer.close()
        with pytest.raises(OSError, match="too large"):
            wait()


def test_a_failed_write_is_raised_by_a_later_save(
    fresh: Callable[[], GPTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training does not go on for hours without a checkpoint because the disk is full."""
    monkeypatch.setattr("model.engine.saving._SECONDS_BETWEEN", 0.0)
    model = fresh()
    optimizer = trained_optimizer(model)

    def save() -> None:
        with CheckpointWriter(tmp_path, model, optimizer, in_background=True) as writer:
            for step in range(1, 100):
                writer.save(step, {"identity": "me"}, keep=[step])
                time.sleep(0.1)
            pytest.fail("the error was not raised")

    with pytest.raises(OSError, match="too large"), full_disk():
        save()


def test_a_fast_training_does_not_wait_for_the_disk(
    fresh: Callable[[], GPTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no checkpoint is due, those that a newer one makes superfluous are dropped, and the best stays."""
    model = fresh()
    optimizer = trained_optimizer(model)
    written = []

    def note(directory: Path, snapshot: Snapshot, step: int, state: dict[str, Any]) -> Path:
        written.append(step)
        return write_checkpoint(directory, snapshot, step, state)

    monkeypatch.setattr("model.engine.saving.write_checkpoint", note)
    with CheckpointWriter(tmp_path, model, optimizer, in_background=True) as writer:
        for step, best in ((0, 0), (4, 4), (8, 4), (12, 12), (16, 12)):
            model.ln_f.bias.data.fill_(step)
            writer.save(step, {"identity": "me"}, keep=[best, step])
        assert not written
        writer.wait()
        assert written == [12, 16]
        writer.save(20, {"identity": "me"}, keep=[12, 20])
    assert written == [12, 16, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012", "step-00000020"]
    assert (load_file(tmp_path / "step-00000012" / "model.safetensors")["ln_f.bias"] == 12).all()


def test_a_checkpoint_is_written_when_it_is_due(
    fresh: Callable[[], GPTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training whose next validation is far away is not without a checkpoint until then."""
    monkeypatch.setattr("model.engine.saving._SECONDS_BETWEEN", 0.5)
    model = fresh()
    with CheckpointWriter(tmp_path, model, trained_optimizer(model), in_background=True) as writer:
        writer.save(4, {"identity": "me"}, keep=[4])
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def save_for_ever(model: GPTModel, directory: Path) -> None:
    """Write checkpoints without end; the final norm's bias is the step."""
    optimizer = trained_optimizer(model)
    for step in range(1, 100_000):
        model.ln_f.bias.data.fill_(step)
        write(directory, model, optimizer, step, {"identity": "me"})
        prune_checkpoints(directory, {step})


def test_twenty_kills_while_saving(fresh: Callable[[], GPTModel], tmp_path: Path) -> None:
    """The newest checkpoint is complete at whatever moment the process is killed."""
    context = multiprocessing.get_context("fork")
    delays = random.Random(0)
    reached = 0
    for _ in range(20):
        writer = context.Process(target=save_for_ever, args=(fresh(), tmp_path))
        writer.start()
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.03))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        found = newest_checkpoint(tmp_path, "me", pytest.fail)
        assert found is not None
        path, state = found
        bias = load_file(path / "model.safetensors")["ln_f.bias"]
        assert (bias == state["step"]).all()
        assert not list(tmp_path.glob(".*"))
        reached = max(reached, state["step"])
        prune_checkpoints(tmp_path, set())
    assert reached > 1


# Resumption

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from model.engine import checkpoint, trunk
from model import GPTModel, freeze_bottom_layers
from model.engine.config import TrainConfig
from model.engine.training import train

weights, tokens, directory, settings, hold_at, die_in_save, cache = sys.argv[1:]
trunk._READ_BYTES = 1e30  # so small a trunk would be computed faster than read
cache = trunk.TrunkCacheConfig(Path(cache) if cache else None)
torch.set_num_threads(1)
save_tensors = checkpoint.save_tensors

def dying(tensors, path):
    save_tensors(tensors, path)
    if die_in_save and all(part in str(path) for part in die_in_save.split(":")):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_tensors = dying
network = GPTModel.from_pretrained(weights)
freeze_bottom_layers(network, 1)
result = train(
    network, Path(tokens), TrainConfig(**json.loads(settings)), Path(directory), "me", cache=cache,
    on_step=lambda report: time.sleep(60 if report.step == int(hold_at) else 0),
)
network.save_pretrained(Path(directory) / "final")
print(json.dumps(vars(result), default=str))
"""


@pytest.fixture
def launch(gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """launch(directory, config, ...): start a training in a process of its own."""
    script = tmp_path / "training.py"
    script.write_text(SCRIPT)

    def start(
        directory: Path, config: TrainConfig, hold_at: int = -1, die_in_save: str = "", cache: Path | None = None
    ) -> subprocess.Popen[str]:
        arguments = [
            str(gpt2_dir),
            str(token_dir),
            str(directory),
            json.dumps(vars(config)),
            str(hold_at),
            die_in_save,
            str(cache or ""),
        ]
        root = str(Path(str(package.__file__)).parents[1])
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def uninterrupted(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path
) -> Callable[[TrainConfig], tuple[GPTModel, Path]]:
    calls = count()

    def run(config: TrainConfig) -> tuple[GPTModel, Path]:
        network, directory = fresh(), tmp_path / f"whole{next(calls)}"
        train(network, token_dir, config, directory, "me")
        return network, directory

    return run


def assert_same_end(directory: Path, whole: Path) -> None:
    """Journals and checkpoints of both trainings are equal to the last bit."""
    assert record(directory) == record(whole)
    names = sorted(p.name for p in whole.glob("step-*"))
    assert sorted(p.name for p in directory.glob("step-*")) == names
    for name in names:
        for file in ("model.safetensors", "trainer.safetensors"):
            assert (directory / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{name}/{file}"


def test_a_training_that_patience_ends_is_resumed_exactly(
    launch: Callable[..., subprocess.Popen[str]],
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    tmp_path: Path,
) -> None:
    """Killed between two validations that found nothing better: it ends at the step of the uninterrupted one.

    The schedule is that of the whole training. Called again, it is complete.
    """
    config = config_of(epochs=10, max_steps=40, learning_rate=0.1, eval_freq=3)
    whole, patient, killed = (tmp_path / name for name in ("whole", "patient", "killed"))
    train(fresh(), token_dir, config, whole, "me")
    config = replace(config, patience=3)
    result = train(fresh(), token_dir, config, patient, "me")
    assert (result.steps, result.best_step) == (18, 9)
    assert record(patient) == record(whole)[: len(record(patient))]

    victim = launch(killed, config, hold_at=17)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (read_journal(killed / "metrics.jsonl") or [{"step": 0}])[-1]["step"] < 17:
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert json.loads((killed / "step-00000015" / "state.json").read_text())["step"] == 15
    second = launch(killed, config)
    output, _ = second.communicate(timeout=120)
    assert json.loads(output)["resumed_from"] == 15
    assert_same_end(killed, patient)
    again = train(fresh(), token_dir, config, patient, "me")
    assert (again.steps, again.best_step, again.resumed_from) == (18, 9, 18)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_killed_training_ends_like_an_uninterrupted_one(
    gpt2_dir: Path,
    launch: Callable[..., subprocess.Popen[str]],
    uninterrupted: Callable[[TrainConfig], tuple[GPTModel, Path]],
    tmp_path: Path,
    dropout: float,
) -> None:
    """Killed after step 6 and resumed from step 4: weights, losses and moments are bitwise equal."""
    config = config_of(dropout=dropout)
    directory = tmp_path / "killed"
    victim = launch(directory, config, hold_at=7)
    deadline = time.monotonic() + 60
    while victim.poll() is None and time.monotonic() < deadline:
        if any(line["step"] >= 6 for line in read_journal(directory / "metrics.jsonl")):
            break
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL

    second = launch(directory, config)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert json.loads(output)["resumed_from"] == 4
    network, whole = uninterrupted(config)
    assert_same_end(directory, whole)
    assert same_tensors(parameters(GPTModel.from_pretrained(directory / "final")), parameters(network))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.safetensors"])
def test_training_killed_while_saving(
    launch: Callable[..., subprocess.Popen[str]],
    uninterrupted: Callable[[TrainConfig], tuple[GPTModel, Path]],
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    tmp_path: Path,
    file: str,
) -> None:
    """Killed with half of step 8's file written: step 4 is resumed, the scratch directory deleted, the end equal."""
    directory = tmp_path / "killed"
    victim = launch(directory, CONFIG, die_in_save=f"step-00000008:{file}")
    victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL
    assert not (directory / "step-00000008").exists()
    assert len(list(directory.glob(".step-00000008.*.tmp"))) == 1
    result = train(fresh(), token_dir, CONFIG, directory, "me")
    assert result.resumed_from == 4
    assert not list(directory.glob(".*"))
    assert_same_end(directory, uninterrupted(CONFIG)[1])


@pytest.mark.parametrize(
    "deleted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["cache kept", "cache deleted"]
)
def test_killed_training_with_trunk_outputs_in_a_file(
    launch: Callable[..., subprocess.Popen[str]],
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deleted: bool,
) -> None:
    """Killed in the first epoch with a half-filled cache; read or computed again, the end is bitwise equal."""
    config = config_of(eval_freq=2, micro_batch_tokens=100, dropout=0.1)
    directory, cache = tmp_path / "killed", tmp_path / "cache"
    victim = launch(directory, config, hold_at=4, cache=cache)
    deadline = time.monotonic() + 60
    while victim.poll() is None and time.monotonic() < deadline:
        if (directory / "step-00000004").exists():
            break
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    sums = {path.parent: np.fromfile(path, dtype="<u4") for path in cache.glob("*/checksums.bin")}
    [partial] = [path for path, values in sums.items() if 0 < np.count_nonzero(values) < len(values)]
    if deleted:
        shutil.rmtree(cache)

    second = launch(directory, config, cache=cache)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    result = json.loads(output)
    assert result["resumed_from"] == 4
    assert "in a file" in result["trunk"]
    assert np.fromfile(partial / "checksums.bin", dtype="<u4").all()

    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1e30)
    network, whole = fresh(), tmp_path / "whole"
    train(network, token_dir, config, whole, "me", cache=TrunkCacheConfig(tmp_path / "another cache"))
    assert_same_end(directory, whole)
    assert same_tensors(parameters(GPTModel.from_pretrained(directory / "final")), parameters(network))
    files = [
        sorted(path.read_bytes() for path in folder.glob("*/*.bin"))
        for folder in (cache, whole.parent / "another cache")
    ]
    assert files[0] == files[1]


class Stop(Exception):
    """Raised by on_step to end a training."""


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    def hook(report: StepReport) -> None:
        if report.step == step:
            raise Stop

    return hook


@pytest.fixture
def resume(
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    uninterrupted: Callable[[TrainConfig], tuple[GPTModel, Path]],
) -> Callable[[TrainConfig, Path, int], None]:
    """resume(config, directory, step): resume a training at that step; it must end like an uninterrupted one."""

    def check(config: TrainConfig, directory: Path, step: int) -> None:
        network = fresh()
        torch.rand(9)  # the random state comes from the checkpoint, not from the process
        result = train(network, token_dir, config, directory, "me")
        assert result.resumed_from == step
        want, whole = uninterrupted(config)
        assert_same_end(directory, whole)
        assert same_tensors(parameters(network), parameters(want))

    return check


# resume(config, directory, step): trains on from there, and compares the end with the uninterrupted training.
Resume = Callable[[TrainConfig, Path, int], None]
STEPS = pytest.mark.parametrize("step", [0, 1, 4, 7, 14])


@STEPS
def test_interrupted_anywhere(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, resume: Resume, step: int
) -> None:
    """Interrupted in the first epoch, in the last, or right after a checkpoint, with dropout: the end is equal."""
    config = config_of(dropout=0.1)
    with pytest.raises(Stop):
        train(fresh(), token_dir, config, tmp_path / "cut", "me", interrupt_at(step))
    resume(config, tmp_path / "cut", step // 4 * 4)


@STEPS
def test_stopped_on_request(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, resume: Resume, step: int
) -> None:
    """The checkpoint is of the step before the stop, not of the last validation; the end is bitwise equal."""
    config = config_of(dropout=0.1)
    reports: list[StepReport] = []

    def asked() -> bool:
        return bool(reports) and reports[-1].step == step

    with pytest.raises(TrainingStoppedError, match=f"after step {step} of 15"):
        train(fresh(), token_dir, config, tmp_path / "cut", "me", reports.append, should_stop=asked)
    assert len([metrics for _, metrics in record(tmp_path / "cut") if "train/loss" in metrics]) == step
    resume(config, tmp_path / "cut", step)


def test_stopped_while_the_base_is_validated(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, resume: Resume
) -> None:
    """Before the first step a training ends after a pass, not after a validation; the next one starts afresh."""
    config = config_of(micro_batch_tokens=200)
    asked: list[bool] = []

    def second_time() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(TrainingStoppedError, match=r"^stopped on request before step 1 of 15$"):
        train(fresh(), token_dir, config, tmp_path / "cut", "me", should_stop=second_time)
    assert len(asked) == 2
    assert not [*(tmp_path / "cut").glob("step-*")]
    resume(config, tmp_path / "cut", 0)


def test_finished_training_is_not_repeated(fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path) -> None:
    """A retry of a finished training returns the same result without training."""
    first = train(fresh(), token_dir, CONFIG, tmp_path, "me")
    before = record(tmp_path)
    network = fresh()
    again = train(network, token_dir, CONFIG, tmp_path, "me", interrupt_at(16))
    of_the_process = {"resumed_from", "first_step_seconds", "peak_memory_bytes", "trunk", "trunk_hit_share"}
    same = {field.name for field in fields(TrainResult)} - of_the_process
    assert {name: getattr(again, name) for name in same} == {name: getattr(first, name) for name in same}
    assert (first.resumed_from, again.resumed_from) == (0, 15)
    assert math.isnan(again.first_step_seconds)  # no step was made
    assert record(tmp_path) == before
    last = load_file(checkpoint_path(tmp_path, first.steps) / "model.safetensors")
    assert same_tensors({k: v for k, v in parameters(network).items() if k in last}, last)


def test_training_resumes_before_a_damaged_checkpoint(
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    tmp_path: Path,
    uninterrupted: Callable[[TrainConfig], tuple[GPTModel, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a flipped bit in the newest checkpoint, the best one before it is resumed, and the end is equal."""
    # Mocked losses: step 4 is the best, so that its checkpoint is kept beside that of step 8.
    [at_step_4] = [m["eval/loss"] for step, m in record(uninterrupted(CONFIG)[1]) if step == 4 and "eval/loss" in m]
    monkeypatch.setattr(
        "model.engine.trainer.mean_loss", lambda sums, counts: abs(float(sums.sum() / counts.sum()) - at_step_4)
    )
    with pytest.raises(Stop):
        train(fresh(), token_dir, CONFIG, tmp_path / "cut", "me", interrupt_at(9))
    assert sorted(p.name for p in (tmp_path / "cut").glob("step-*")) == ["step-00000004", "step-00000008"]
    flip(tmp_path / "cut" / "step-00000008" / "model.safetensors", -1)
    warnings: list[str] = []
    result = train(fresh(), token_dir, CONFIG, tmp_path / "cut", "me", warn=warnings.append)
    assert result.resumed_from == 4
    assert "step-00000008" in warnings[0]
    assert_same_end(tmp_path / "cut", uninterrupted(CONFIG)[1])


def test_damaged_best_checkpoint_is_made_again(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a flipped bit in the best checkpoint the training is repeated, so that the best weights exist again."""
    monkeypatch.setattr("model.engine.trainer.mean_loss", lambda sums, counts: 1.0)  # the base stays the best
    first = train(fresh(), token_dir, CONFIG, tmp_path, "me")
    whole = {name: value.clone() for name, value in load_file(first.best / "model.safetensors").items()}
    assert first.best_step == 0 < first.steps
    flip(first.best / "model.safetensors", -1)
    warnings: list[str] = []
    again = train(fresh(), token_dir, CONFIG, tmp_path, "me", warn=warnings.append)
    assert again.resumed_from == 0
    assert "step-00000000" in warnings[0]
    assert same_tensors(load_file(again.best / "model.safetensors"), whole)


def test_another_training_does_not_resume_from_it(
    fresh: Callable[[], GPTModel],
    token_dir: Path,
    tmp_path: Path,
    uninterrupted: Callable[[TrainConfig], tuple[GPTModel, Path]],
) -> None:
    """A checkpoint with another identity is ignored: the training starts fresh, with an empty journal."""
    train(fresh(), token_dir, config_of(seed=7, max_steps=9), tmp_path / "reused", "other")
    result = train(fresh(), token_dir, CONFIG, tmp_path / "reused", "me")
    assert result.resumed_from == 0
    assert_same_end(tmp_path / "reused", uninterrupted(CONFIG)[1])


def edit_lines(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


JOURNAL_DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line missing": lambda lines: lines[:9] + lines[10:],
    "the last line missing": lambda lines: lines[:-1],
    "a validation missing": lambda lines: [
        line for line in lines if not (json.loads(line)["step"] == 8 and b"eval/loss" in line)
    ],
    "a line twice": lambda lines: lines[:9] + lines[8:],
    "two lines exchanged": lambda lines: [*lines[:7], lines[8], lines[7], *lines[9:]],
    "not text": lambda lines: [*lines[:9], b"\xff\xfe\n", *lines[10:]],
    "not JSON": lambda lines: [*lines[:9], b"{]\n", *lines[10:]],
    "null": lambda lines: [*lines[:9], b"null\n", *lines[10:]],
    "a step that is text": lambda lines: [*lines[:9], b'{"step": "8", "time": 1, "metrics": {}}\n', *lines[10:]],
    "a metric that is text": lambda lines: [
        *lines[:9], b'{"step": 8, "time": 1, "metrics": {"train/loss": "0"}}\n', *lines[10:]
    ],
    "empty": lambda lines: [],
}  # fmt: skip


@pytest.mark.parametrize("damage", JOURNAL_DAMAGES)
def test_a_damaged_journal_is_mended(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, damage: str
) -> None:
    """A finished training is resumed before the damage; journal and weights end as if there had been none."""
    calm = tmp_path / "calm"
    train(fresh(), token_dir, CONFIG, calm, "me")
    damaged = tmp_path / "damaged"
    shutil.copytree(calm, damaged)
    edit_lines(damaged / "metrics.jsonl", JOURNAL_DAMAGES[damage])
    warnings: list[str] = []
    model = fresh()
    result = train(model, token_dir, CONFIG, damaged, "me", warn=warnings.append)
    assert "metrics.jsonl" in warnings[0]
    assert record(damaged) == record(calm)
    best = load_file(result.best / "model.safetensors")
    assert same_tensors(best, load_file(calm / result.best.name / "model.safetensors"))


@pytest.mark.parametrize("step", [16, 99_999_999])
def test_a_step_after_the_end_is_not_a_finished_training(
    fresh: Callable[[], GPTModel], token_dir: Path, tmp_path: Path, step: int
) -> None:
    """Even where directory, state and journal agree on it."""
    calm = train(fresh(), token_dir, CONFIG, tmp_path, "me")
    shutil.copytree(tmp_path / "step-00000015", tmp_path / f"step-{step:08d}")
    edit(tmp_path / f"step-{step:08d}", step=step, journal_lines=step + 5)
    warnings: list[str] = []
    again = train(fresh(), token_dir, CONFIG, tmp_path, "me", warn=warnings.append)
    assert again.steps == calm.steps == 15
    assert any(f"step {step}" in warning for warning in warnings)
