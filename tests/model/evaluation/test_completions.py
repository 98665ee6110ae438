"""Completions of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model import GPTModel, generate
from model.evaluation.completions import SamplingConfig, complete, extract_code
from model.net.prompt import encode_prompts

PROMPTS = ["Write a function.", "Add 3 to a price, please.", "x"]


def test_completions_start_where_training_did(gpt2_dir: Path, tokenizer: Any) -> None:
    """axolotl#834: the prompt is rendered as in training, and answered in the order asked, whatever the batches."""
    model = GPTModel.from_pretrained(gpt2_dir)
    config = SamplingConfig(max_new_tokens=12, temperature=0.0, prompts_at_once=2)
    want = generate(model, encode_prompts(tokenizer, PROMPTS), 12, tokenizer.eos_token_id, temperature=0.0)
    got = complete(model, tokenizer, PROMPTS, config)
    assert [text for text, _ in got] == [
        tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id]) for ids in want
    ]
    assert [stopped for _, stopped in got] == [ids[-1] == tokenizer.eos_token_id for ids in want]


@pytest.mark.parametrize(
    ("ids", "want"),
    [([65, 66, 0], ("", True)), ([0], ("", True)), ([65, 66], ("", False)), ([], ("", False))],
)
def test_stop_is_told_from_the_cut(
    gpt2_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, ids: list[int], want: tuple[str, bool]
) -> None:
    """Stopped means EOS before max_new_tokens; the text is without it."""
    monkeypatch.setattr("model.evaluation.completions.generate", lambda *args: [ids])
    [(text, stopped)] = complete(GPTModel.from_pretrained(gpt2_dir), tokenizer, ["x"], SamplingConfig())
    assert stopped == want[1]
    assert text == tokenizer.decode([i for i in ids if i])
    assert "<|endoftext|>" not in text


def test_same_seed_same_completions(gpt2_dir: Path, tokenizer: Any) -> None:
    """Base and tuned model draw with the same numbers; batches do not repeat each other's."""
    model = GPTModel.from_pretrained(gpt2_dir)
    config = SamplingConfig(max_new_tokens=16, temperature=1.0, top_k=None, top_p=None, prompts_at_once=1)
    first = complete(model, tokenizer, ["same"] * 3, config)
    assert complete(model, tokenizer, ["same"] * 3, config) == first
    assert len(set(first)) == 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef f(x):\n    return x\n```", "def f(x):\n    return x\n"),
        ("Here it is:\n\n```\nx = 1\n```\nDone.", "x = 1\n"),
        ("  ```py\n  x = 1\n  ```  ", "  x = 1\n"),
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("```\na\n```\n```\nb\n```", "```\na\n```\n```\nb\n```"),
        ("```python\nx = 1\n", "```python\nx = 1\n"),
        ("s = '```'", "s = '```'"),
    ],
)
def test_code_is_taken_out_of_one_fence(text: str, code: str) -> None:
    """Two fences, or an open one, are left as they are: which of them is meant is not guessed."""
    assert extract_code(text) == code
