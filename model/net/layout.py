"""The files of a directory in Hugging Face's GPT-2 layout, and what a directory is that has none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from model.files import is_plain_file, parse_json, plain_name, shown_bare

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Weights that are not read, and what they are.
_OTHERS = {
    "*.bin": "a Python pickle",
    "*.pt": "a Python pickle",
    "*.pth": "a Python pickle",
    "*.ckpt*": "a pickle or TensorFlow's",
    "*.gguf": "for llama.cpp",
    "*.h5": "for TensorFlow",
    "*.msgpack": "for Flax",
    "*.onnx": "for ONNX",
    "*.distcp": "a part of a sharded training checkpoint",
}
_INNER = (f"*/{WEIGHTS_FILE}", f"*/{INDEX_FILE}", f"snapshots/*/{WEIGHTS_FILE}", f"snapshots/*/{INDEX_FILE}")
_CONVERT = "transformers' save_pretrained writes it"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: the single one, or the shards its index names.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard is missing; the message says what is there instead.
            Pickled weights (.bin, .pt) are never read.
        ValueError: it is an adapter, or the index is damaged or names a file outside its directory.
    """
    if adapter := next((name for name in _ADAPTER if (directory / name).exists()), None):
        raise ValueError(
            f"{directory} holds an adapter ({adapter}), which is not a whole model: merge it into its base with "
            "peft's merge_and_unload(), save the result with save_pretrained() in another folder, and name that"
        )
    for name in (WEIGHTS_FILE, INDEX_FILE):
        path = directory / name
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).is_file():
        return _shards(directory)
    raise FileNotFoundError(f"{directory} holds no {WEIGHTS_FILE}{_instead(directory)}")


def model_files(directory: Path) -> list[Path]:
    """What a model is read from: config.json, and the files of ``weight_files``, which raises."""
    return [directory / CONFIG_FILE, *weight_files(directory)]


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    raw = parse_json(index.read_bytes(), index)
    try:
        names = sorted(set(raw["weight_map"].values()))
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("weight_map names no files")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    for name in names:
        if not is_plain_file(directory / plain_name(name, index)):
            raise FileNotFoundError(f"{index} names {shown_bare(name)}, which does not exist")
    return [directory / name for name in names]


def _instead(directory: Path) -> str:
    """What a directory without weights has instead, and what to do, as the rest of a sentence."""
    inner = {path.parent for pattern in _INNER for path in directory.glob(pattern)}
    if inner:
        names = [str(path.relative_to(directory)) for path in sorted(inner, key=_by_number)]
        more = f" and {len(names) - 3} more of its folders" if len(names) > 3 else ""
        return f", but {', '.join(names[-3:])}{more} in it do: name one of these folders"
    if tensors := sorted(path.name for path in directory.glob("*.safetensors") if path.is_file()):
        return (
            f", but {', '.join(tensors[:3])}: rename it if it is the whole model; parts of a model need their "
            f"{INDEX_FILE} beside them"
        )
    for pattern, kind in _OTHERS.items():
        if found := next((path.name for path in sorted(directory.glob(pattern))), None):
            return f", but {found} ({kind}): weights are read from safetensors only; {_CONVERT}"
    return f": weights are read from safetensors only; {_CONVERT}"


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts checkpoint-500 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
