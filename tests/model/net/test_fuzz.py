"""Fuzzing of a model's files: any bytes give the weights that the files say, or one error that names the file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import PLACES, check_message, hypothesis, limits, mutated_bytes, mutated_json, put, settings, st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.net.config import GPTConfig
from model.net.loading import hash_pretrained, hf_state_dict, read_pretrained
from model.net.tensor_file import FLOATS, open_tensors
from model.net.tokenizer import hash_tokenizer, load_tokenizer

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, random_hf: Callable[..., Any]) -> Path:
    """A model of two blocks in one file, and the same in two files with an index in the folder beside it."""
    directory = tmp_path_factory.mktemp("small") / "whole"
    reference = random_hf(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=20)
    reference.save_pretrained(directory)
    reference.save_pretrained(directory.with_name("shards"), max_shard_size="5KB")
    assert (directory.with_name("shards") / INDEX).exists()
    return directory


@pytest.fixture(scope="module")
def config(small: Path) -> dict[str, Any]:
    return dict(json.loads((small / "config.json").read_text()))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder of its own, with a file beside it that no example may open."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    return folder


def _read(directory: Path) -> None:
    """Load a model in both ways; what is loaded is what the safetensors library reads in its files."""
    with limits(directory):
        shape, hashes = hash_pretrained(directory)
        model = read_pretrained(directory, CPU, torch.float32, hashes)
    assert shape == model.config
    stored: dict[str, Any] = {}
    for name in hashes:
        if name != "config.json":
            stored |= load_file(directory / name)
    for key, value in hf_state_dict(model).items():
        ends = [name for name in stored if name.endswith(key.removeprefix("transformer."))]
        assert any(torch.equal(stored[name].float(), value) for name in ends), key


@settings(few=30, share=0.3)
@hypothesis.given(data=st.data())
def test_any_config_is_the_shape_or_refused(config: dict[str, Any], small: Path, here: Path, data: Any) -> None:
    """Whatever is accepted fits the weights beside it."""
    shutil.copy(small / "model.safetensors", here)
    put(here / "config.json", data.draw(mutated_json(config)), data.draw(PLACES))
    try:
        _read(here)
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(here))
    try:
        with limits(here):
            shape = GPTConfig.from_json(here / "config.json")
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(here / "config.json"))
        return
    said = json.loads((here / "config.json").read_bytes())
    for name in ("vocab_size", "n_embd", "n_layer", "n_head"):
        assert getattr(shape, name) == said[name]


@settings(few=50, share=0.3)
@hypothesis.given(data=st.data())
def test_any_header_is_read_or_refused(small: Path, here: Path, data: Any) -> None:
    """The header's JSON is changed, its length fits or not, and so do the bytes behind it."""
    content = (small / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = data.draw(mutated_json(header))
    said = len(changed) + data.draw(st.sampled_from([0] * 8 + [-1, 1, 100, 2**40, 2**63]))
    whole = (max(0, said) % 2**64).to_bytes(8, "little") + changed + content[8 + length :]
    shutil.copy(small / "config.json", here)
    put(here / "model.safetensors", data.draw(mutated_bytes(whole, 1)), data.draw(PLACES))
    try:
        _read(here)
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(here))


_SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**20, 2**40, 2**63, 2**64]), max_size=4) | st.just([1] * 70)


@settings(few=80, share=1.0)
@hypothesis.given(
    entries=st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from([*FLOATS, "I8", "U16", "F4", "BOOL", "x"]), _SHAPES, st.integers(0, 64)),
        max_size=4,
    )
)
def test_any_tensors_are_those_of_the_library(here: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """Each file that is read has the values that the safetensors library finds, or the library refuses it."""
    place, header, path = 0, {}, here / "any.safetensors"
    for key, (dtype, shape, size) in entries.items():
        exact = math.prod(shape) * (FLOATS[dtype].itemsize if dtype in FLOATS else 1)
        size = exact if exact < 4096 else size
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header).encode()
    put(path, len(raw).to_bytes(8, "little") + raw + bytes(index % 251 for index in range(place)))
    try:
        with limits(here), open_tensors(path) as file:
            found = {key: tensor.clone() for key, tensor in file.tensors()}
    except ValueError as error:
        check_message(error, str(path))
        return
    try:
        known = load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError, TypeError):
        return
    for key, tensor in found.items():
        assert known[key].shape == tensor.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), known[key].reshape(-1).view(torch.uint8))


@settings(few=40, share=0.3)
@hypothesis.given(data=st.data())
def test_any_index_is_followed_inside_its_folder(small: Path, here: Path, data: Any) -> None:
    """Shards are renamed, doubled, swapped; no name leads out of the folder."""
    shards = small.with_name("shards")
    for path in here.iterdir():
        put(path, b"", "absent")
    for path in shards.iterdir():
        shutil.copy(path, here)
    index = json.loads((shards / INDEX).read_text())
    if data.draw(st.booleans()):
        name = data.draw(
            st.sampled_from(["../secret.safetensors", "..", ".", "x" * 300, "a\0b", "/dev/zero", "config.json"])
        )
        index["weight_map"][data.draw(st.sampled_from(sorted(index["weight_map"])))] = name
    put(here / INDEX, data.draw(mutated_json(index)), data.draw(PLACES))
    try:
        _read(here)
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(here))
    finally:
        for path in here.iterdir():
            put(path, b"", "absent")


@settings(few=15, share=0.15)
@hypothesis.given(data=st.data())
def test_any_values_are_loaded_as_they_are_or_refused(small: Path, here: Path, data: Any) -> None:
    """Tensors get other names, dtypes and values, and the file is written by the library."""
    weights = load_file(small / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(weights)))
        dtype = data.draw(st.sampled_from([*FLOATS.values(), torch.int8, torch.bool, torch.float8_e4m3fn]))
        kind = data.draw(st.sampled_from(["dtype", "value", "shape", "name", "delete"]))
        tensor = weights.pop(key)
        if kind == "dtype":
            weights[key] = tensor.to(dtype)
        elif kind == "value":
            weights[key] = tensor.clone()
            if tensor.dtype in FLOATS.values():
                weights[key].fill_(data.draw(st.floats(width=16)))
        elif kind == "shape":
            weights[key] = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1)]))).contiguous()
        elif kind == "name":
            weights[data.draw(st.sampled_from([f"module.{key}", f"x.{key}", key.upper(), "wte.weight"]))] = tensor
        if not weights:
            return
    shutil.copy(small / "config.json", here)
    put(here / "model.safetensors", b"")
    save_file(weights, here / "model.safetensors")
    try:
        _read(here)
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(here))


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json")


@settings(few=20, share=0.1)
@hypothesis.given(data=st.data())
def test_any_tokenizer_gives_back_text_or_is_refused(gpt2_dir: Path, here: Path, data: Any) -> None:
    """One or two of a tokenizer's files are changed."""
    secret = here.parent / "secret.json"
    secret.write_text((gpt2_dir / "tokenizer.json").read_text().replace('"add"', '"SECRET"'))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        put(here / name, (gpt2_dir / name).read_bytes())
    put(here / "special_tokens_map.json", b"", "absent")
    for name in data.draw(st.lists(st.sampled_from(_TOKENIZER_FILES), min_size=1, max_size=2)):
        value = json.loads((gpt2_dir / name).read_text()) if (gpt2_dir / name).exists() else {"eos_token": "a"}
        if name == "tokenizer_config.json" and data.draw(st.booleans()):
            setting = st.sampled_from(
                ["tokenizer_file", "vocab_file", "merges_file", "auto_map", "tokenizer_class", "x"]
            )
            value[data.draw(setting)] = data.draw(
                st.sampled_from([str(secret), "../secret.json", "BertTokenizer", 1])
            )
        put(here / name, data.draw(mutated_json(value)), data.draw(PLACES))
    try:
        with limits(here):
            tokenizer = load_tokenizer(here, 320, hash_tokenizer(here) if data.draw(st.booleans()) else None)
            assert "SECRET" not in tokenizer.get_vocab()
            ids = tokenizer.encode("def add(price):\n\treturn price")
            assert tokenizer.decode(ids) == "def add(price):\n\treturn price"
    except ValueError as error:
        check_message(error, str(here))
