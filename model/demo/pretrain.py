"""``python -m model.demo.pretrain DIRECTORY``: make the embedded tiny base from scratch, on one GPU in minutes.

The text is the source of the running Python's standard library (PSF licence), without its tests. A
byte-level BPE of 4,096 entries is trained on it, then a GPT-2 of the "tiny" preset with the project's own training
loop. Functions with a docstring are repeated as an answer to it, in the format of fine-tuning, so that the trunk has
seen the two headings of a prompt; no task of the sample data is among them.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.data.tokens import write_meta
from model.engine.checkpoint import load_trained
from model.engine.config import TrainConfig
from model.engine.trainer import StepReport
from model.engine.training import train
from model.files import sha256_file
from model.net.config import GPTConfig
from model.net.device import resolve_device
from model.net.gpt import GPTModel
from model.net.prompt import encode, format_prompt
from model.net.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
_HELD_OUT = 50  # one of this many files is for validation


def standard_library() -> Iterator[str]:
    """The source of each module, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def documented_functions(source: str) -> Iterator[str]:
    """Each short function with a docstring, as an answer to the docstring's first paragraph."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            body = node.body[1:]
            if not body:
                continue
            code = textwrap.dedent(ast.unparse(ast.FunctionDef(**{**vars(node), "body": body, "decorator_list": []})))
            if len(code) < 1500:
                request = f"{' '.join(text.split(chr(10) * 2)[0].split())} Call it {node.name}."
                yield format_prompt({"prompt": request, "completion": code})


def train_tokenizer(texts: list[str], directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the texts and write it in the format of transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, unk_token=END_OF_TEXT
    ).save_pretrained(str(directory))
    return load_tokenizer(directory, vocab_size)


def write_windows(
    texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, length: int, directory: Path
) -> dict[str, int]:
    """Write token files in the layout of ``model.data.preparing.prepare``: rows of ``length`` tokens with no prompt.

    Returns:
        Tokens by split.
    """
    directory.mkdir(parents=True)
    counts = {}
    for split, documents in texts.items():
        flat = np.concatenate([np.array([*ids, tokenizer.eos_token_id]) for ids in encode(tokenizer, documents)])
        rows = len(flat) // length
        flat[: rows * length].astype("<u2").tofile(directory / f"{split}.ids.bin")
        np.save(directory / f"{split}.lengths.npy", np.tile(np.array([[length, 0]], dtype=np.int32), (rows, 1)))
        counts[split] = rows * length
    write_meta(directory, {"dtype": "<u2"})
    return counts


def pretrain(directory: Path, epochs: int, batch_size: int, learning_rate: float, max_steps: int | None) -> None:
    """Train tokenizer and model; write both, in fp16, with a model card to ``directory``."""
    started = time.time()
    config = GPTConfig.preset("tiny")
    modules = list(standard_library())
    tokenizer = train_tokenizer(modules, directory, config.vocab_size)
    texts = {
        "train": [text for i, text in enumerate(modules) if i % _HELD_OUT],
        "validation": modules[::_HELD_OUT],
    }
    texts["train"] += [pair for text in texts["train"] for pair in documented_functions(text)]
    random.Random(0).shuffle(texts["train"])
    device = resolve_device("auto")
    torch.manual_seed(0)
    with device:
        model = GPTModel(replace(config, vocab_size=len(tokenizer)))
    settings = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        max_steps=max_steps,
        learning_rate=learning_rate,
        weight_decay=0.1,
        eval_freq=100,
        eval_rows=None,
        precision="bf16" if device.type == "cuda" else "fp32",
        micro_batch_tokens=batch_size * config.n_positions,
    )
    with TemporaryDirectory() as scratch:
        counts = write_windows(texts, tokenizer, config.n_positions, Path(scratch) / "tokens")
        print(f"{len(modules)} modules, {len(texts['train'])} texts, tokens {counts}", flush=True)

        def show(report: StepReport) -> None:
            if report.eval_loss is not None or report.step % 500 == 0:
                print(report, flush=True)

        result = train(model, Path(scratch) / "tokens", settings, Path(scratch) / "run", "pretrain", show)
        load_trained(result.best, model)
    model.half().save_pretrained(directory, tokenizer.eos_token_id)
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": round(time.time() - started),
        "train_tokens": counts["train"],
        "validation_tokens": counts["validation"],
        "steps": result.steps,
        "best_step": result.best_step,
        "tokens_per_step": batch_size * config.n_positions,
        "learning_rate": learning_rate,
        "validation_loss": round(result.best_eval_loss, 4),
    }
    (directory / "README.md").write_text(model_card(facts))
    print(json.dumps(facts), flush=True)
    # They belong into EMBEDDED_SHA256 of model/demo if this is to be the embedded base.
    hashes = {path.name: sha256_file(path) for path in sorted(directory.glob("*.*")) if path.name != "README.md"}
    print(json.dumps(hashes), flush=True)


def model_card(facts: dict[str, Any]) -> str:
    """The model card: what the weights are, their origin and licence, and a table of facts."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
license: psf-2.0
pipeline_tag: text-generation
---
# A tiny GPT-2 for the embedded default

GPT-2's architecture, 192 wide, 6 blocks, 6 heads, 512 positions, with a byte-level BPE of 4,096 entries, in fp16.
Made from scratch by `python -m model.demo.pretrain` on the source of the Python standard library, without its tests
(Python Software Foundation License 2). It knows a little Python and follows no instructions: it is there to be
fine-tuned in a minute on a CPU, and for nothing else. The weights are those of the step with the lowest validation
loss (nats per token, on every 50th module).

| | |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.demo.pretrain", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the base is written; model/demo/base in the repository")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="windows of 512 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--max-steps", type=int)
    given = parser.parse_args()
    pretrain(given.directory, given.epochs, given.batch_size, given.learning_rate, given.max_steps)


if __name__ == "__main__":
    main()
