"""Scores of rows: each row's loss on its response, and the mean over tokens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from other_python import python_with
from transformers import GPT2LMHeadModel

from model import GPTModel
from model.data.config import PrepareConfig
from model.data.layout import find_splits
from model.data.preparing import prepare
from model.data.tokens import CodeAlpacaDataset
from model.demo import EMBEDDED_BASE
from model.demo.grammar import write_rows
from model.engine.engine import Engine
from model.engine.scoring import mean_loss, row_losses
from model.net.loading import write_with_tokenizer
from model.net.tokenizer import load_tokenizer

LM_EVAL_TASK = Path(__file__).resolve().parents[2] / "helpers" / "lm_eval_rows"


def reference_losses(gpt2_dir: Path, dataset: CodeAlpacaDataset) -> list[tuple[float, int]]:
    """Summed loss and number of targets by transformers, one unpadded row at a time, in float64."""
    reference = GPT2LMHeadModel.from_pretrained(gpt2_dir).eval().double()
    results = []
    for i in range(len(dataset)):
        ids, prompt = dataset[i]["input_ids"], int(dataset.lengths[i, 1])
        with torch.no_grad():
            logits = reference(ids[None]).logits[0]
        losses = F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="none")
        results.append((losses.sum().item(), len(ids) - prompt))
    return results


@pytest.mark.parametrize("max_tokens", [1, 200, 10_000])
def test_row_losses_equal_transformers(gpt2_dir: Path, token_dir: Path, max_tokens: int) -> None:
    """Losses are per row, in the order of the rows, however many rows share a pass."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    engine = Engine(GPTModel.from_pretrained(gpt2_dir), torch.float32)
    sums, counts = row_losses(engine, dataset, max_tokens)
    want = reference_losses(gpt2_dir, dataset)
    assert counts.tolist() == [count for _, count in want]
    np.testing.assert_allclose(sums, [loss for loss, _ in want], rtol=1e-5)


def test_mean_is_over_tokens() -> None:
    """torchtitan#4167: 100 nats over 11 tokens, not the mean of row means."""
    assert mean_loss(np.array([90.0, 10.0]), np.array([10, 1])) == pytest.approx(100 / 11)


def test_scoring_restores_the_mode_and_ignores_dropout(tiny_model: GPTModel, token_dir: Path) -> None:
    """A validation during the training has no dropout, and restores mode and random state."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    want, _ = row_losses(Engine(tiny_model, torch.float32), dataset, 500)
    tiny_model.set_dropout(0.5)
    tiny_model.train()
    state = torch.get_rng_state()
    got, _ = row_losses(Engine(tiny_model, torch.float32), dataset, 500)
    assert (got == want).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [block.training for block in tiny_model.h] == [False, False, True]
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.slow
def test_lm_eval_gives_the_same_log_likelihoods(tmp_path: Path) -> None:
    """lm-eval loads an exported model and scores the test rows of the demo: each row's loss, and their sum."""
    python = python_with("lm_eval", "LM_EVAL_PYTHON")
    model = GPTModel.from_pretrained(EMBEDDED_BASE)
    tokenizer = load_tokenizer(EMBEDDED_BASE, model.config.vocab_size)
    write_rows(tmp_path / "rows")
    prepare(find_splits(tmp_path / "rows"), tokenizer, PrepareConfig(), tmp_path / "tokens")
    dataset = CodeAlpacaDataset(tmp_path / "tokens", "test")
    sums, _ = row_losses(Engine(model, torch.float32), dataset, 10_000)

    write_with_tokenizer(model, tokenizer, tmp_path / "model")
    rows = [json.dumps({name: row[name] for name in ("prompt", "completion")}) for row in dataset.rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=model,dtype=float32"]
    command += ["--device", "cpu", "--batch_size", "16", "--tasks", "gpt2_code_rows", "--log_samples"]
    command += ["--include_path", str(LM_EVAL_TASK), "--output_path", "out"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    total = json.loads(results.read_text())["results"]["gpt2_code_rows"]["response_loglikelihood,none"]
    assert total == pytest.approx(-sums.sum(), rel=1e-3)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = {sample["doc_id"]: sample["response_loglikelihood"] for sample in map(json.loads, samples.open())}
    assert len(found) == len(dataset) == 324
    np.testing.assert_allclose([-found[number] for number in range(len(found))], sums, rtol=1e-3)
