"""Training checkpoints: complete, pickle-free, each in a directory of its own that is whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.files import atomic_directory, remove_strays, sha256_file, write_json
from model.gpt import GPTModel

MODEL_FILE = "model.safetensors"
TRAINER_FILE = "trainer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8})$")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def save_checkpoint(
    directory: Path, model: GPTModel, optimizer: torch.optim.Optimizer, step: int, state: dict[str, Any]
) -> Path:
    """Write what a resumed training needs: trained tensors, optimizer, random states, position.

    The frozen rest is not written; ``state["identity"]`` is a hash over all that determines the
    training, the base's sha256 among it. The directory
    appears under its name only when every file in it is on disk.

    Args:
        directory: of the training.
        step: optimizer steps done.
        state: JSON to go with it.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    trainer: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if model.wte.weight.is_cuda:
        trainer["rng.cuda"] = torch.cuda.get_rng_state(model.wte.weight.device)
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            trainer[f"{key}.{names[parameter]}"] = value.detach().cpu()
    target = checkpoint_path(directory, step)
    with atomic_directory(target) as scratch:
        save_file({name: p.detach().cpu().contiguous() for p, name in names.items()}, scratch / MODEL_FILE)
        save_file(trainer, scratch / TRAINER_FILE)
        files = {name: sha256_file(scratch / name) for name in (MODEL_FILE, TRAINER_FILE)}
        write_json(scratch / STATE_FILE, {**state, "step": step, "files": files})
    return target


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, once both its files have proved to be what was written.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the message names the file.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        for name, sha256 in state["files"].items():
            if sha256_file(path / name) != sha256:
                raise ValueError(f"{path / name} is not what was written: its sha256 differs from {STATE_FILE}'s")
    except (OSError, LookupError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {path} is not complete: {error}") from error
    return state


def load_trained(path: Path, model: GPTModel) -> None:
    """Put a checkpoint's trained tensors into a model frozen in the same way, once its files are verified.

    Raises:
        ValueError: the checkpoint is damaged, or has other names or shapes than the model trains.
    """
    load_state(path)
    tensors = load_file(path / MODEL_FILE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        raise ValueError(f"{path} trains other parameters: {sorted(tensors.keys() ^ trained.keys())[:5]}")
    for name, parameter in trained.items():
        if tensors[name].shape != parameter.shape:  # copy_ would broadcast
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(parameter.shape)}")
        parameter.data.copy_(tensors[name])


def load_checkpoint(path: Path, model: GPTModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore trained tensors, optimizer and random states.

    Raises:
        ValueError: as load_trained.
    """
    load_trained(path, model)
    trainer = load_file(path / TRAINER_FILE)
    torch.set_rng_state(trainer.pop("rng.cpu"))
    if "rng.cuda" in trainer:
        torch.cuda.set_rng_state(trainer.pop("rng.cuda"), model.wte.weight.device)
    parameters = dict(model.named_parameters())
    device = model.wte.weight.device
    for key, value in trainer.items():
        kind, name = key.split(".", 1)
        # As torch keeps it: the step counter on the CPU unless the optimizer is fused.
        on_cpu = kind == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameters[name]][kind] = value if on_cpu else value.to(device)


def newest_checkpoint(
    directory: Path, identity: str, warn: Callable[[str], None] = lambda message: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of this very training, or None; what a killed writer left is removed.

    A damaged one is passed over with a warning, and the one before it is taken.
    """
    if not directory.is_dir():
        return None
    remove_strays(directory)
    for path in sorted((p for p in directory.iterdir() if _NAME.match(p.name)), reverse=True):
        try:
            state = load_state(path)
            if state.get("identity") != identity:
                raise ValueError(f"{path} belongs to another training")
        except ValueError as error:
            warn(f"{error}; an earlier checkpoint is tried")
            continue
        return path, state
    return None


def prune_checkpoints(directory: Path, keep: set[int]) -> None:
    """Delete the checkpoints of all other steps."""
    for path in directory.iterdir():
        match = _NAME.match(path.name)
        if match and int(match[1]) not in keep:
            shutil.rmtree(path, ignore_errors=True)
