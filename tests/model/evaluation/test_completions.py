"""Completions of prompts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPTModel, generate
from model.evaluation.completions import _fit, complete, extract_code
from model.evaluation.config import SamplingConfig
from model.net.prompt import encode_prompts

PROMPTS = ["Write a function.", "Add 3 to a price, please.", "x"]


def test_completions_start_where_training_did(gpt2_dir: Path, tokenizer: Any) -> None:
    """axolotl#834: the prompt is rendered as in training, and answered in the order asked, whatever the batches."""
    model = GPTModel.from_pretrained(gpt2_dir)
    config = SamplingConfig(max_new_tokens=12, temperature=0.0)
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
    config = SamplingConfig(max_new_tokens=16, temperature=1.0, top_k=None, top_p=None)
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


def test_many_open_fences_are_read_once() -> None:
    """One expression for a whole fence took 6 s for 16,000 of these lines, four times as long for twice as many."""
    text = "```a\n" * 30_000
    begin = time.perf_counter()
    assert extract_code(text) == text
    assert time.perf_counter() - begin < 5


def test_a_prompt_beyond_the_context_keeps_its_headings(
    gpt2_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-2#121: the middle is cut, so that both headings and the end of the instruction stay; the cut is told."""
    shown: list[list[int]] = []

    def spy(model: GPTModel, prompts: list[list[int]], *settings: Any) -> list[list[int]]:
        shown.extend(prompts)
        return generate(model, prompts, *settings)

    monkeypatch.setattr("model.evaluation.completions.generate", spy)
    told: list[str] = []
    long = "begin " + "adds 3 to a price " * 60 + "end"
    model = GPTModel.from_pretrained(gpt2_dir)
    config = SamplingConfig(max_new_tokens=12, temperature=0.0)
    complete(model, tokenizer, ["Short.", long], config, warn=told.append)
    whole = encode_prompts(tokenizer, [long])[0]
    short, cut = shown
    assert tokenizer.decode(short) == "### Instruction:\nShort.\n\n### Response:\n"
    assert len(cut) == 96 - 12
    text = tokenizer.decode(cut)
    assert text.startswith("### Instruction:\n")
    assert text.endswith("price end\n\n### Response:\n")
    (line,) = told
    assert line.startswith(f"{len(whole) - len(cut)} of the {len(whole)} tokens of prompt 2 were cut")


def test_new_tokens_beyond_the_context_leave_half_of_it_to_the_prompt(gpt2_dir: Path, tokenizer: Any) -> None:
    model = GPTModel.from_pretrained(gpt2_dir)
    told: list[str] = []
    config = SamplingConfig(max_new_tokens=200, temperature=1.0, top_k=None, top_p=None)
    ((text, _),) = complete(model, tokenizer, ["adds 3 " * 100], config, warn=told.append)
    assert text
    assert len(told) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_padded_embedding_are_never_drawn(gpt2_dir: Path, tokenizer: Any, temperature: float) -> None:
    """transformers#24372: they have no text, and would come back as none."""
    small = GPTModel.from_pretrained(gpt2_dir)
    model = GPTModel(replace(small.config, vocab_size=384))
    rows = torch.cat([small.wte.weight, 5 * small.wte.weight[:64]]).detach()
    model.load_state_dict({**small.state_dict(), "wte.weight": rows, "lm_head.weight": rows})
    drawn = SamplingConfig(max_new_tokens=20, temperature=temperature, top_k=None, top_p=None)
    for (text, stopped), ids in zip(complete(model, tokenizer, PROMPTS, drawn), PROMPTS, strict=True):
        assert stopped or len(tokenizer.encode(text)) > 0, ids
    alone = complete(small, tokenizer, PROMPTS, drawn)
    if temperature == 0:
        assert complete(model, tokenizer, PROMPTS, drawn) == alone


def test_a_heading_has_half_of_the_room_at_most() -> None:
    """Of 20 tokens 5 are for the completion: 7 of the heading and the last 8 of the prompt are left."""
    assert _fit(list(range(100)), 50, 20, 5) == ([*range(7), *range(92, 100)], 7)
    assert _fit(list(range(100)), 3, 20, 5) == ([*range(3), *range(88, 100)], 3)
    assert _fit(list(range(20)), 50, 20, 5) == (list(range(20)), 7)
