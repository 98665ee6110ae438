"""The tokenizer without transformers gives the ids and the texts of the one with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from model.demo import EMBEDDED_BASE, EMBEDDED_SHA256
from model.files import ChangedFileError
from model.net.config import GPTConfig
from model.net.plain_tokenizer import PlainTokenizer, load_plain_tokenizer
from model.net.prompt import encode, encode_prompts, heading_lengths
from model.net.tokenizer import load_tokenizer, unknown_ids

TEXTS = [
    "def f(x):\n\treturn  x",
    "",
    " a . b",
    "é 中文 \U0001f600\u200d",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "x" * 5000,
]
SIZE = GPTConfig.preset("tiny").vocab_size


def _compare(plain: Any, whole: Any, size: int) -> None:
    assert encode(plain, TEXTS) == encode(whole, TEXTS)
    prompts = encode_prompts(plain, TEXTS)
    assert prompts == encode_prompts(whole, TEXTS)
    assert heading_lengths(plain, prompts) == heading_lengths(whole, prompts)
    assert [plain.decode(ids) for ids in prompts] == [whole.decode(ids) for ids in prompts]
    assert plain.eos_token_id == whole.eos_token_id
    assert plain.decode([whole.eos_token_id]) == whole.decode([whole.eos_token_id])
    assert len(plain) == len(whole)
    assert unknown_ids(plain, size) == unknown_ids(whole, size)


def test_it_equals_that_of_transformers() -> None:
    plain = load_plain_tokenizer(EMBEDDED_BASE, SIZE)
    assert isinstance(plain, PlainTokenizer)
    _compare(plain, load_tokenizer(EMBEDDED_BASE, SIZE), SIZE)


def test_a_directory_without_tokenizer_json(tokenizer_dir: Path, gpt2_dir: Path) -> None:
    """It is loaded by transformers."""
    plain = load_plain_tokenizer(gpt2_dir, 320)
    whole = load_tokenizer(gpt2_dir, 320)
    assert encode(plain, TEXTS) == encode(whole, TEXTS)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    for name in EMBEDDED_SHA256:
        shutil.copy(EMBEDDED_BASE / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ChangedFileError, match=r"tokenizer\.json"):
        load_plain_tokenizer(tmp_path, SIZE, EMBEDDED_SHA256)
