"""The GGUF export: what is in the file, what is refused, and llama.cpp's own tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from other_python import python_with
from safetensors import safe_open

from model import GPTConfig, GPTModel, generate
from model.demo import EMBEDDED_BASE
from model.files import ChangedFileError, sha256_file
from model.net.gguf_file import write_gguf
from model.net.loading import write_with_tokenizer
from model.net.prompt import CHAT_TEMPLATE, encode_prompts
from model.net.tokenizer import load_tokenizer

PROMPTS = [
    "Write a Python function named apply that takes x and multiplies x by 17.",
    "Wörter, 日本語 and \U0001f600;  two  spaces\n\ttabs\n\n\nblank lines",
    "class Node:\n    def __init__(self, value):\n        self.value = value",
    "it's <|endoftext|> don't 12345.678e-9 (a+b)*c  ",
]
# llama-cpp-python in another process: prints the ids of each text and of its greedy continuation, and the greedy
# answers to the requests as chat messages.
LLAMA = """
import json, sys
from llama_cpp import Llama
path, texts, requests, count = json.load(sys.stdin)
model = Llama(path, n_ctx=512, n_threads=1, verbose=False)
found = []
for text in texts:
    ids, new = model.tokenize(text.encode(), add_bos=False, special=False), []
    model.reset()
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        new.append(token)
        if len(new) == count or token == model.token_eos():
            break
    found.append([ids, new])
answers = []
for request in requests:
    messages = [{"role": "user", "content": request}]
    answer = model.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=count)
    answers.append(answer["choices"][0]["message"]["content"])
print(json.dumps({"tokens": found, "answers": answers, "metadata": model.metadata}))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded base as it is exported."""
    path = tmp_path_factory.mktemp("gguf") / "model"
    model = GPTModel.from_pretrained(EMBEDDED_BASE)
    write_with_tokenizer(model, load_tokenizer(EMBEDDED_BASE, model.config.vocab_size), path)
    return path


@pytest.fixture(scope="module")
def written(directory: Path) -> Path:
    """It as a GGUF file in f32."""
    file = directory.parent / "model.gguf"
    write_gguf(directory, file, name="gpt2-code-tiny")
    return file


def _fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def _key(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' GPT-2, by its published table."""
    table = {
        "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    }  # fmt: skip
    stem, _, kind = name.removeprefix("transformer.").rpartition(".")
    if not stem.startswith("h."):
        return f"{table[stem]}.{kind}"
    _, block, part = stem.split(".", 2)
    return f"blk.{block}.{table[part]}.{kind}"


def test_every_tensor_is_that_of_the_weights(directory: Path, written: Path) -> None:
    """Bit for bit, Conv1D's transposed; no tensor is missing, and the tied head is not written."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    with safe_open(directory / "model.safetensors", "np") as stored:
        assert set(tensors) == {_key(name) for name in stored.keys()}
        for name in stored.keys():
            values = stored.get_tensor(name)
            if ".c_" in name and name.endswith(".weight"):
                values = values.T
            assert tensors[_key(name)].tensor_type.name == "F32"
            assert np.array_equal(tensors[_key(name)].data, values), name


def test_the_metadata_is_llama_cpps(directory: Path, written: Path) -> None:
    """Architecture, shape, vocabulary with types and merges, special tokens and prompt format."""
    fields = _fields(written)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]
    expected = {
        "general.architecture": "gpt2",
        "general.name": "gpt2-code-tiny",
        "general.file_type": 0,
        "gpt2.context_length": 512,
        "gpt2.block_count": 6,
        "gpt2.embedding_length": 192,
        "gpt2.feed_forward_length": 768,
        "gpt2.attention.head_count": 6,
        "gpt2.attention.layer_norm_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary["vocab"], key=vocabulary["vocab"].get),
        "tokenizer.ggml.token_type": [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 4095,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    for name, value in expected.items():
        assert fields[name] == value, name


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2**-10), ("bf16", 2**-8), ("q8_0", 0.02)])
def test_matrices_in_other_types(
    directory: Path, written: Path, tmp_path: Path, dtype: Any, tolerance: float
) -> None:
    """Matrices are rounded to the type; vectors and the position embedding stay f32."""
    write_gguf(directory, tmp_path / "model.gguf", dtype)
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(written).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        vector = tensor.name == "position_embd.weight" or exact[tensor.name].ndim == 1
        assert tensor.tensor_type.name == ("F32" if vector else dtype.upper())
        values = dequantize(tensor.data, tensor.tensor_type)
        bound = 0 if vector else tolerance * np.abs(exact[tensor.name]).max()
        assert np.abs(values - exact[tensor.name]).max() <= bound, tensor.name
    assert _fields(tmp_path / "model.gguf")["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[dtype]


def test_a_head_of_its_own_is_written(directory: Path, tmp_path: Path) -> None:
    """With train_head the head is not the embedding."""
    model = GPTModel(GPTConfig(**{**asdict(GPTConfig.preset("tiny")), "n_layer": 1, "tie_word_embeddings": False}))
    write_with_tokenizer(model, load_tokenizer(EMBEDDED_BASE, 4096), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert np.array_equal(tensors["output.weight"], model.lm_head.weight.detach().numpy())
    assert not np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def _damage_padded(path: Path) -> None:
    model = GPTModel(GPTConfig(**{**asdict(GPTConfig.preset("tiny")), "n_layer": 1, "vocab_size": 4160}))
    model.save_pretrained(path, 0)


def _damage_tokenizer(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    (path / "tokenizer.json").write_text(json.dumps(content))


def _damage_weights(path: Path) -> None:
    model = GPTModel.from_pretrained(path)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[3, 5] = 1e5
    model.save_pretrained(path, 0)


@pytest.mark.parametrize(
    ("damage", "dtype", "complaint"),
    [
        (_damage_padded, "f32", "the embedding has 4160 rows, and 64 of them, from 4096 on, have no token"),
        (_damage_tokenizer, "f32", "the tokenizer splits text in another way than GPT-2's byte-level BPE"),
        (_damage_weights, "f16", r"blk\.0\.ffn_up\.weight has values that f16 cannot hold .*: write bf16 or f32"),
    ],
)
def test_what_gguf_cannot_hold_is_named(
    directory: Path, tmp_path: Path, damage: Any, dtype: Any, complaint: str
) -> None:
    """One sentence, and no file: neither a new one nor half of one in place of an old one."""
    path = tmp_path / "model"
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    damage(path)
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    target.write_text("an older one")
    with pytest.raises(ValueError, match=complaint):
        write_gguf(path, target, dtype)
    assert [file.name for file in target.parent.iterdir()] == ["model.gguf"]
    assert target.read_text() == "an older one"


def test_only_plain_files_are_replaced(directory: Path, tmp_path: Path) -> None:
    """By root, a rename to /dev/null replaces the device by the model."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(FileExistsError, match=f"{target} exists and is no plain file"):
            write_gguf(directory, target)
    assert (tmp_path / "pipe").is_fifo()


def test_changed_files_are_refused(directory: Path, tmp_path: Path) -> None:
    """The export writes what was registered, and nothing else."""
    files = {file.name: sha256_file(file) for file in directory.iterdir()}
    write_gguf(directory, tmp_path / "model.gguf", files=files)
    with pytest.raises(ChangedFileError, match=r"model\.safetensors has changed"):
        write_gguf(directory, tmp_path / "other.gguf", files={**files, "model.safetensors": "0" * 64})


def test_without_the_library(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gguf: .*\[gguf\]"):
        write_gguf(directory, tmp_path / "model.gguf")


def _ask_llama(file: Path, texts: list[str], requests: list[str], count: int) -> dict[str, Any]:
    python = python_with("llama_cpp", "LLAMA_CPP_PYTHON")
    job = json.dumps([str(file), texts, requests, count])
    done = subprocess.run([python, "-c", LLAMA], input=job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_llama_cpp_gives_the_same_tokens(directory: Path, written: Path) -> None:
    """llama.cpp encodes the prompts to the same ids and continues them greedily with the same ids, in f32."""
    model = GPTModel.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model.config.vocab_size)
    ids = encode_prompts(tokenizer, PROMPTS)
    expected = generate(model, ids, max_new_tokens=48, eos_token_id=tokenizer.eos_token_id, temperature=0.0)
    texts = [tokenizer.decode(prompt) for prompt in ids]
    found = _ask_llama(written, texts, PROMPTS[:3], 48)  # the literal <|endoftext|> of the last is a token in a chat
    assert [prompt for prompt, _ in found["tokens"]] == ids
    assert [new for _, new in found["tokens"]] == expected
    assert sum(map(len, expected)) > 60
    assert found["metadata"]["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert found["answers"] == [tokenizer.decode(new, skip_special_tokens=True) for new in expected[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_opens_the_other_types(directory: Path, written: Path, tmp_path: Path, dtype: Any) -> None:
    """Rounded weights begin an answer as the exact ones do."""
    write_gguf(directory, tmp_path / "model.gguf", dtype)
    files = (written, tmp_path / "model.gguf")
    exact, rounded = (_ask_llama(file, [], PROMPTS[:1], 8)["answers"] for file in files)
    assert rounded == exact
    assert len(exact[0]) > 8
