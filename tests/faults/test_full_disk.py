"""A disk that becomes full, a real one of 24 MB: FAULTS 6 and 44."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_disk import fill, small_disk

from flows.full_disk import naming_the_disk
from model import GPTModel, freeze_bottom_layers
from model.engine.checkpoint import load_state, take_snapshot, write_checkpoint
from model.engine.journal import MetricsJournal, read_journal
from model.engine.state import TrainingState
from model.engine.stepper import build_optimizer
from model.engine.trainer import StepReport
from model.engine.training import TrainConfig, train
from model.files import DiskFullError, atomic_directory, naming_a_full_disk, sha256_file, write_json
from ops.mistakes import MACHINE
from ops.settings import DataRootError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    epochs=3, max_steps=15, batch_size=8, learning_rate=1e-2, eval_freq=4, warmup_ratio=0.2, precision="fp32"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as mounted:
        yield mounted


def _write_journal(path: Path) -> None:
    journal = MetricsJournal(path)
    for step in range(100_000):
        journal.append(step, {"x": 1.0})


def _write_directory(path: Path) -> None:
    with atomic_directory(path) as scratch:
        (scratch / "rows").write_bytes(b"x" * 10**8)


def _write_array(path: Path) -> None:
    """As the gguf library writes tensors; numpy's error has no number."""
    with naming_a_full_disk(path), atomic_directory(path) as scratch:
        np.zeros(10**6).tofile(scratch / "array")


@pytest.mark.parametrize(
    "write",
    [lambda path: write_json(path, list(range(10_000))), _write_journal, _write_directory, _write_array],
    ids=["JSON", "journal", "directory", "array"],
)
def test_path_and_bytes_are_named(disk: Path, write: Callable[[Path], Any]) -> None:
    """Whatever is written; nothing half is left but the journal's last line."""
    path = disk / "what is written"
    ballast = fill(disk, leave=8192)
    with pytest.raises(DiskFullError, match=rf"cannot write {path}.* \([\d,]+ bytes are free there\): No space left"):
        write(path)
    ballast.unlink()
    assert {each.name for each in disk.iterdir()} <= {path.name}
    if path.exists():
        lines = MetricsJournal(path).lines
        assert [line["step"] for line in read_journal(path)] == list(range(lines))


@pytest.mark.parametrize("fits", [0.0, 0.3, 0.9], ids=["nothing", "a third", "nearly all"])
def test_row_6_a_checkpoint_that_does_not_fit(disk: Path, gpt2_dir: Path, fits: float) -> None:
    """The disk fills up before, in and near the end of a checkpoint: the error names path and bytes.

    The checkpoint before it keeps every byte, and no part of the new one is left.
    """
    model = GPTModel.from_pretrained(gpt2_dir)
    optimizer = build_optimizer(model, CONFIG)
    model(torch.arange(20)[None]).square().mean().backward()
    optimizer.step()

    def save(step: int) -> Path:
        state = TrainingState("me", 512, step, 0.5, 0.5, best_step=step, journal_lines=step + 1).to_json()
        return write_checkpoint(disk, take_snapshot(model, optimizer), step, state)

    def content(directory: Path) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in directory.iterdir()}

    before = content(old := save(4))
    size = sum(path.stat().st_size for path in old.iterdir())
    ballast = fill(disk, leave=int(fits * size))
    for step in (4, 8):  # in place of the old one, and beside it
        with pytest.raises(
            DiskFullError, match=rf"cannot write {disk}/.*step-0000000{step}.* \([\d,]+ bytes are free there\)"
        ):
            save(step)
        assert {path.name for path in disk.iterdir()} == {"ballast", old.name}
        assert content(old) == before
    assert load_state(old)["step"] == 4
    ballast.unlink()
    assert load_state(save(8))["step"] == 8


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_training_goes_on_when_there_is_room(disk: Path, gpt2_dir: Path, token_dir: Path, step: int) -> None:
    """The disk is full after a step: the checkpoint before is whole, and the end is that of a calm training."""

    def fresh() -> GPTModel:
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, 1)
        return model

    calm = train(fresh(), token_dir, CONFIG, disk.parent / "calm", "me")
    directory = disk / "training"

    def on_step(report: StepReport) -> None:
        if report.step == step:
            fill(disk)

    with pytest.raises(DiskFullError, match=rf"cannot write {directory}/.* \([\d,]+ bytes are free there\)"):
        train(fresh(), token_dir, CONFIG, directory, "me", on_step=on_step)
    newest = max(directory.glob("step-*"))
    load_state(newest)
    (disk / "ballast").unlink()
    again = train(fresh(), token_dir, CONFIG, directory, "me")
    assert again.resumed_from == int(newest.name.removeprefix("step-"))
    ours, expected = load_file(again.best / "model.safetensors"), load_file(calm.best / "model.safetensors")
    assert all((ours[name] == expected[name]).all() for name in expected)


SETTINGS = ("num_unfrozen_layers=0", "max_steps=60", "eval_freq=10", "sample_rows=0", "pass_rows=0")
COMMAND = [sys.executable, "-m", "flows", *SETTINGS]


@pytest.mark.slow
def test_a_run_with_everything_on_a_full_disk(tmp_path: Path) -> None:
    """Databases too: path and bytes are named, no success is recorded, and the next run goes on."""
    with small_disk(tmp_path / "disk", 200) as disk:
        environment = {**os.environ, "FINETUNE_DATA_ROOT": str(disk), "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(
            COMMAND, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while not list(disk.glob("trainings/*/step-00000010")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        began = time.monotonic()
        fill(disk)
        output, _ = run.communicate(timeout=300)
        print(f"ended after {time.monotonic() - began:.1f} s")
        print(output[-3000:])
        assert run.returncode == MACHINE
        assert re.search(rf"(cannot write|the disk of) {disk}.*[ (][\d,]+ (bytes )?are free", output)
        # As full at the start of the next one: a fault of the machine, not a mistake of the user.
        done = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == MACHINE
        assert "Traceback" not in done.stderr
        assert re.search(rf"{disk}.* [\d,]+ bytes are free", done.stderr)
        (disk / "ballast").unlink()
        done = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "this training was resumed at step" in done.stdout + done.stderr
        assert shutil.disk_usage(disk).free > 0


def test_a_read_only_data_root_is_named(tmp_path: Path) -> None:
    """In mid-run, whatever file is written; a file elsewhere is named by the system's own words."""
    with small_disk(tmp_path / "disk") as disk:
        root = disk / "root"
        root.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        said = rf"^nothing can be written in the data root {root} \({root}/x: Read-only file system\): set FINETUNE_"
        with pytest.raises(DataRootError, match=said), naming_the_disk(root):
            (root / "x").touch()
        with pytest.raises(OSError, match="Read-only") as caught, naming_the_disk(tmp_path):
            (disk / "x").touch()
        assert isinstance(caught.value, DataRootError)
        with pytest.raises(OSError, match="Read-only") as caught, naming_the_disk(tmp_path / "other"):
            (disk / "x").touch()
        assert not isinstance(caught.value, DataRootError)
