"""Fuzzing of what a training reads back: a damaged checkpoint or journal is passed over or refused, never trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import PLACES, check_message, hypothesis, limits, mutated_bytes, mutated_json, put, settings, st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPTModel, freeze_bottom_layers
from model.engine.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from model.engine.config import TrainConfig
from model.engine.journal import MetricsJournal, check_journal, read_journal
from model.engine.state import CheckpointRecord, TrainingState
from model.engine.stepper import build_optimizer
from model.files import sha256_file

STEPS = (4, 8)
LOSSES = {0: 3.5, 4: 2.5, 8: 3.0}
FILES = ("model.safetensors", "trainer.safetensors")


def _lines() -> list[dict[str, Any]]:
    """A journal of eight steps, with a validation before the first, after the fourth and after the last."""
    lines = [{"step": 0, "time": 1, "metrics": {"eval/loss": LOSSES[0]}}]
    for step in range(1, 9):
        lines.append({"step": step, "time": step, "metrics": {"train/loss": 4 - step / 10}})
        if step in STEPS:
            lines.append({"step": step, "time": step, "metrics": {"eval/loss": LOSSES[step]}})
    return lines


LINES = _lines()
JOURNAL = "".join(json.dumps(line) + "\n" for line in LINES).encode()


@pytest.fixture(scope="module")
def model(gpt2_dir: Path) -> GPTModel:
    found = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(found, 0)  # the final norm alone: small files
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: GPTModel) -> Path:
    """The directory of a training with two checkpoints and its journal."""
    directory = tmp_path_factory.mktemp("whole") / "training"
    optimizer = build_optimizer(model, TrainConfig())
    for step in STEPS:
        model(torch.randint(300, (2, 20))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        lines = 1 + step + sum(each <= step for each in STEPS)
        state = TrainingState("me", 512, step, LOSSES[0], LOSSES[4], 4, lines)
        write_checkpoint(directory, take_snapshot(model, optimizer, copy=True), step, state.to_json())
    (directory / "metrics.jsonl").write_bytes(JOURNAL)
    return directory


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """A copy of it, with a file beside it that no example may touch."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    shutil.copytree(whole, folder)
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret" / "kept").touch()
    return folder


@st.composite
def _journals(draw: Any) -> bytes:
    """Journals whose lines are lost, doubled, swapped, changed, cut."""
    lines = [json.dumps(line).encode() for line in LINES]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["lose", "double", "swap", "change", "join", "bytes"]))
        if kind == "lose" and len(lines) > 1:
            del lines[place]
        elif kind == "double":
            lines.insert(place, lines[place])
        elif kind == "swap":
            lines[place - 1], lines[place] = lines[place], lines[place - 1]
        elif kind == "change":
            lines[place] = draw(mutated_json(draw(st.sampled_from(LINES)), 1))
        elif kind == "bytes":
            lines[place] = draw(mutated_bytes(lines[place], 1))
    end = draw(st.sampled_from([b"\n", b"\n", b"\n", b"", b"\r\n", b"\0"]))
    return bytes(draw(mutated_bytes(b"\n".join(lines) + end, draw(st.sampled_from([0, 0, 1])))))


@settings(few=60)
@hypothesis.given(content=_journals(), place=PLACES, start=st.integers(0, 14))
def test_any_journal_is_read_or_refused(here: Path, content: bytes, place: str, start: int) -> None:
    """What is read is what the lines say, and a journal that fits a checkpoint has each of its steps, in order."""
    path = here / "metrics.jsonl"
    put(path, content, place)
    try:
        with limits(here):
            found = read_journal(path, start)
    except ValueError as error:
        check_message(error, str(path))
    else:
        there = content.split(b"\n")[:-1][start:] if place in ("file", "link") else []
        assert [dict(line) for line in found] == [json.loads(line) for line in there]
    try:
        with limits(here):
            check_journal(path, 11, 8, {0: LOSSES[0], 4: LOSSES[4]})
    except ValueError as error:
        check_message(error, str(path))
    else:
        kept = [json.loads(line) for line in content.split(b"\n")[:11]]
        assert [line["step"] for line in kept if "train/loss" in line["metrics"]] == list(range(1, 9))
        assert {line["step"]: line["metrics"]["eval/loss"] for line in kept if "eval/loss" in line["metrics"]}[
            4
        ] == 2.5
    try:
        with limits(here):
            journal = MetricsJournal(path)
            journal.append(9, {"x": 1.0})
            journal.truncate(2)
    except ValueError as error:
        check_message(error, str(path))
    else:
        assert path.read_bytes().count(b"\n") == journal.lines <= 2


def _renew(here: Path, whole: Path) -> None:
    shutil.rmtree(here)
    shutil.copytree(whole, here)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key].double(), right[key].double()) for key in left)


def _check_against_journal(here: Path, record: CheckpointRecord) -> None:
    check_journal(here / "metrics.jsonl", record.journal_lines, record.step, record.eval_losses)


@settings(few=30)
@hypothesis.given(data=st.data())
def test_any_checkpoint_is_whole_or_passed_over(here: Path, whole: Path, data: Any) -> None:
    """What is found is as it was written, and each one that is passed over is named in a warning."""
    _renew(here, whole)
    for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=2, unique=True)):
        path = checkpoint_path(here, step)
        kind = data.draw(st.sampled_from(["state", "state", "tensors", "folder"]))
        if kind == "state":
            record = json.loads((checkpoint_path(whole, step) / "state.json").read_text())
            put(path / "state.json", data.draw(mutated_json(record)), data.draw(PLACES))
        elif kind == "tensors":
            name = data.draw(st.sampled_from(FILES))
            content = (checkpoint_path(whole, step) / name).read_bytes()
            put(path / name, data.draw(mutated_bytes(content, 1)), data.draw(PLACES))
        else:
            put(path, b"", data.draw(st.sampled_from(["file", "absent", "folder", "loop", "dangling"])))
    if data.draw(st.integers(0, 3)) == 0:
        put(here / "metrics.jsonl", data.draw(_journals()))
    (here / ".stray.tmp").symlink_to(here.parent / "secret")
    (here / f"step-{data.draw(st.sampled_from(['99999999', '0000000x', '٠٠٠٠٠٠٠٨', '00000004']))}.tmp").mkdir()
    warnings: list[str] = []
    try:
        with limits(here):
            found = newest_checkpoint(
                here, "me", warnings.append, lambda record: _check_against_journal(here, record)
            )
            if found:
                state = TrainingState.from_json(found.state, 512)
    finally:
        kept = (here.parent / "secret" / "kept").exists()
    assert kept
    for warning in warnings:
        check_message(ValueError(warning), str(here))
    if found:
        assert found.path == checkpoint_path(here, state.step)
        known = json.loads((checkpoint_path(whole, state.step) / "state.json").read_text())
        assert {**state.to_json(), "files": known["files"], "micro_batch_tokens": 512} == known
        for name in FILES:
            assert sha256_file(found.path / name) == known["files"][name]


@settings(few=40)
@hypothesis.given(data=st.data())
def test_any_tensors_are_loaded_as_they_are_or_refused(here: Path, whole: Path, model: GPTModel, data: Any) -> None:
    """Tensors of other names, shapes and dtypes, with the checksums that fit them."""
    _renew(here, whole)
    path = checkpoint_path(here, 8)
    name = data.draw(st.sampled_from(FILES))
    tensors = load_file(checkpoint_path(whole, 8) / name)
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(key)
        kind = data.draw(st.sampled_from(["delete", "name", "shape", "dtype", "add"]))
        if kind == "name":
            tensors[data.draw(st.sampled_from(["rng.cuda", "x", "exp_avg.wte.weight", "step.", f"{key}x"]))] = tensor
        elif kind == "shape":
            tensors[key] = data.draw(st.sampled_from([tensor.reshape(1, -1), tensor.reshape(-1)[:1].clone()]))
        elif kind == "dtype":
            tensors[key] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.int32, torch.bool])))
        elif kind == "add":
            tensors |= {key: tensor, data.draw(st.sampled_from(["y", "exp_avg.x"])): tensor.clone()}
        if not tensors:
            return
    put(path / name, b"")
    save_file(tensors, path / name)
    if data.draw(st.integers(0, 3)) == 0:
        put(path / name, data.draw(mutated_bytes((path / name).read_bytes())))
    record = json.loads((checkpoint_path(whole, 8) / "state.json").read_text())
    record["files"][name] = sha256_file(path / name)
    (path / "state.json").write_text(json.dumps(record))
    optimizer = build_optimizer(model, TrainConfig())
    try:
        with limits(here):
            load_checkpoint(path, model, optimizer)
    except ValueError as error:
        check_message(error, str(path))
    else:
        after = take_snapshot(model, optimizer)
        assert _same(after.trainer if name == FILES[1] else after.model, load_file(path / name))
