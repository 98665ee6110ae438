"""Damage to the files of a model, which loads without complaint or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def flip(path: Path, position: int = -1) -> None:
    """Flip the lowest bit of a byte, by default of the last one."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def swap_entries(directory: Path) -> None:
    """Let two tokens of the tokenizer change places."""
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(raw))


def put_nan(directory: Path) -> None:
    """Make one value of the weights NaN."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, path)
