"""The embedded default's inputs, made on the spot: a few hundred rows, their tokenizer, a random tiny GPT-2.

It shows that the pipeline runs where nothing can be downloaded; it says nothing about what a real base
learns.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch

from model.config import GPTConfig
from model.files import atomic_directory
from model.gpt import GPTModel

ROWS_DIRECTORY = "rows"
BASE_DIRECTORY = "base"
_END_OF_TEXT = "<|endoftext|>"

# (what to ask, the function's body) with {name} its name, {x} its argument and {n} a number.
_TASKS = [
    ("adds {n} to a number", "return {x} + {n}"),
    ("subtracts {n} from a number", "return {x} - {n}"),
    ("multiplies a number by {n}", "return {x} * {n}"),
    ("checks whether a number is greater than {n}", "return {x} > {n}"),
    ("checks whether a number is divisible by {n}", "return {x} % {n} == 0"),
    ("returns the first {n} items of a list", "return {x}[:{n}]"),
    ("repeats a string {n} times", "return {x} * {n}"),
    ("returns the items of a list that are below {n}", "return [item for item in {x} if item < {n}]"),
]
_PHRASES = ["Write a Python function that {task}.", "Create a function in Python which {task}.", "Code: {task}."]
_ARGUMENTS = ["x", "value", "data"]


def demo_rows(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows, ``prompt`` and ``completion``; every tenth combination of the grammar is test."""
    rows = []
    for (task, body), phrase, argument, n in itertools.product(_TASKS, _PHRASES, _ARGUMENTS, range(2, 8)):
        prompt = phrase.format(task=task.format(n=n)) + f" Call the argument {argument}."
        completion = f"def solve({argument}):\n    {body.format(x=argument, n=n)}"
        rows.append({"prompt": prompt, "completion": completion})
    random.Random(seed).shuffle(rows)
    held_out = len(rows) // 10
    return rows[held_out:], rows[:held_out]


def write_demo(directory: Path) -> None:
    """Write ``rows/`` (train.jsonl, test.jsonl) and ``base/`` (Hugging Face's GPT-2 layout), unless it exists."""
    if directory.exists():
        return
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    train, test = demo_rows()
    with atomic_directory(directory) as scratch:
        (scratch / ROWS_DIRECTORY).mkdir()
        for split, rows in (("train", train), ("test", test)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (scratch / ROWS_DIRECTORY / f"{split}.jsonl").write_text(lines)
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            [text for row in train for text in row.values()],
            vocab_size=512,
            special_tokens=[_END_OF_TEXT],
            show_progress=False,
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, eos_token=_END_OF_TEXT, bos_token=_END_OF_TEXT, unk_token=_END_OF_TEXT
        )
        tokenizer.save_pretrained(str(scratch / BASE_DIRECTORY))
        shape = vars(GPTConfig.preset("tiny")) | {"vocab_size": len(tokenizer)}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            GPTModel(GPTConfig(**shape)).save_pretrained(scratch / BASE_DIRECTORY, tokenizer.eos_token_id)
