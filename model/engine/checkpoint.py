"""Training checkpoints without pickle, each in a directory of its own that is either complete or absent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.engine.adamw import MOMENTS, AdamW
from model.engine.state import CheckpointFiles, CheckpointRecord
from model.files import (
    atomic_directory,
    reason_of,
    remove_strays,
    save_tensors,
    sha256_file,
    shown,
    write_json,
)
from model.net.gpt import GPTModel
from model.records import read_record

MODEL_FILE = "model.safetensors"
TRAINER_FILE = "trainer.safetensors"
STATE_FILE = "state.json"
_FURTHER = "further"  # first part of the names of tensors that belong to no parameter
_NAME = re.compile(r"step-(\d{8})$")
CPU = torch.device("cpu")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return directory / f"step-{step:08d}"


def newest_step(directory: Path) -> int:
    """The step of a training's newest checkpoint, which may be damaged; 0 without one."""
    matches = [_NAME.match(path.name) for path in directory.glob("step-*")]
    return max((int(match[1]) for match in matches if match), default=0)


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a checkpoint.

    Attributes:
        model: trained tensors by name.
        trainer: moments of the optimizer by kind and name, and further tensors by name.
    """

    model: dict[str, Tensor]
    trainer: dict[str, Tensor]


def take_snapshot(
    model: GPTModel,
    optimizer: AdamW,
    further: Mapping[str, Tensor] | None = None,
    copy: bool = False,
    device: torch.device = CPU,
) -> Snapshot:
    """The current tensors of a training, on ``device``.

    Args:
        copy: copy all tensors, so that later steps do not change them; without it, tensors that are on the CPU
            already are shared with the training.
        further: tensors of the training's state by name, besides those of model and optimizer.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=copy).contiguous()

    trainer = {f"{_FURTHER}.{name}": on_device(tensor) for name, tensor in (further or {}).items()}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            trainer[f"{key}.{names[parameter]}"] = on_device(value)
    return Snapshot({name: on_device(p) for p, name in names.items()}, trainer)


def write_checkpoint(directory: Path, snapshot: Snapshot, step: int, state: dict[str, Any]) -> Path:
    """Write what a resumed training needs: trained tensors, optimizer, position.

    Frozen tensors are not written: ``state["identity"]``, a hash over everything that determines the training, covers
    the base's sha256. The directory gets its name only when every file in it is on disk.

    Args:
        directory: directory of the training.
        step: optimizer steps done.
        state: further content of state.json.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: the checkpoint could not be written; an older checkpoint of this step is unchanged.
    """
    target = checkpoint_path(directory, step)
    parts = {MODEL_FILE: snapshot.model, TRAINER_FILE: snapshot.trainer}
    with atomic_directory(target) as scratch:

        def write(name: str) -> str:
            save_tensors(parts[name], scratch / name)
            return sha256_file(scratch / name)

        with ThreadPoolExecutor(len(parts)) as threads:  # most of the time is hashing, which needs no GIL
            files = dict(zip(parts, threads.map(write, parts), strict=True))
        write_json(scratch / STATE_FILE, {**state, "step": step, "files": files})
    return target


def load_state(path: Path, names: Collection[str] = (MODEL_FILE, TRAINER_FILE)) -> dict[str, Any]:
    """Content of a checkpoint's state.json, after its files were verified against the checksums in it.

    Args:
        names: files to verify.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the message names the file.
    """
    try:
        found = read_record(path / STATE_FILE, CheckpointFiles)
        if path != checkpoint_path(path.parent, found.step):
            raise ValueError(f"{path / STATE_FILE} is damaged: it says step {found.step}")
        for name in names:
            if sha256_file(path / name) != found.files.get(name):
                raise ValueError(f"{path / name} is damaged: its sha256 is not the one in {STATE_FILE}")
    except OSError as error:
        raise ValueError(f"checkpoint {path} is not complete: {error}") from error
    return found.model_dump()


def load_trained(path: Path, model: GPTModel) -> None:
    """Verify a checkpoint's trained tensors and copy them into a model that is frozen in the same way.

    Raises:
        ValueError: the checkpoint is damaged, or its names or shapes differ from those that the model trains.
    """
    load_state(path, [MODEL_FILE])
    _put_trained(path, model)


def _put_trained(path: Path, model: GPTModel) -> None:
    tensors = _load_tensors(path / MODEL_FILE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        raise ValueError(f"{path} trains other parameters: {shown(sorted(tensors.keys() ^ trained.keys())[:5])}")
    for name, parameter in trained.items():
        if tensors[name].shape != parameter.shape:  # copy_ would broadcast
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
        if not tensors[name].is_floating_point():  # copy_ would convert
            raise ValueError(f"{path}: {name} is of the dtype {tensors[name].dtype}, expected {parameter.dtype}")
        parameter.data.copy_(tensors[name])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: it is no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch has not
        raise ValueError(f"{path} is damaged: {reason_of(error)}") from error


def load_checkpoint(
    path: Path, model: GPTModel, optimizer: AdamW, further: Mapping[str, Tensor] | None = None
) -> None:
    """Restore trained tensors and optimizer, and overwrite ``further`` tensors of the training's state.

    Raises:
        ValueError: as for ``load_trained``, or moments or further tensors are not those of this training.
    """
    load_state(path)
    _put_trained(path, model)
    trainer = _load_tensors(path / TRAINER_FILE)
    for name, tensor in (further or {}).items():
        found = trainer.pop(f"{_FURTHER}.{name}", None)
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{path / TRAINER_FILE} has no such {name}: it belongs to another training")
        tensor.copy_(found)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = model.wte.weight.device
    moments = {f"{kind}.{name}": p.shape for name, p in parameters.items() for kind in MOMENTS}
    moments |= {f"step.{name}": torch.Size() for name in parameters}
    if trainer and (
        {key: value.shape for key, value in trainer.items()} != moments
        or not all(value.is_floating_point() for value in trainer.values())
    ):
        raise ValueError(f"{path / TRAINER_FILE} is damaged: its moments are not those of the trained tensors")
    for key, value in trainer.items():
        kind, name = key.split(".", 1)
        optimizer.state.setdefault(parameters[name], {})[kind] = value.to(device)


class FoundCheckpoint(NamedTuple):
    """A verified checkpoint: its directory, and the content of its state.json."""

    path: Path
    state: dict[str, Any]


def newest_checkpoint(
    directory: Path,
    identity: str,
    warn: Callable[[str], None] = lambda message: None,
    check: Callable[[CheckpointRecord], None] = lambda record: None,
) -> FoundCheckpoint | None:
    """The newest usable checkpoint of this training, or None; scratch directories of killed processes are removed.

    A damaged checkpoint is skipped, and so is one that ``check`` refuses. So is one whose best checkpoint so far is
    damaged: a training resumed from it could end without its best weights.

    Args:
        directory: directory of the training.
        identity: checkpoints with another identity are skipped.
        warn: called with a message for each skipped checkpoint.
        check: raises ValueError for a checkpoint that something else contradicts.
    """
    if not directory.is_dir():
        return None
    remove_strays(directory)
    for path in sorted((p for p in directory.iterdir() if _NAME.match(p.name)), reverse=True):
        try:
            state = load_state(path)
            if state.get("identity") != identity:
                raise ValueError(f"{path} belongs to another training")
            record = read_record(path / STATE_FILE, CheckpointRecord)
            check(record)
            if record.best_step != record.step:
                load_state(checkpoint_path(directory, record.best_step), [MODEL_FILE])
        except ValueError as error:
            warn(f"{error}; an earlier checkpoint is tried")
            continue
        return FoundCheckpoint(path, state)
    return None


def prune_checkpoints(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all steps that ``keep`` lacks."""
    for path in directory.iterdir():
        match = _NAME.match(path.name)
        if match and int(match[1]) not in keep:
            shutil.rmtree(path, ignore_errors=True)
