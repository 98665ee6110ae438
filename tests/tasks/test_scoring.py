"""The outputs of a broken model; the flow's tests show those of others."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from model.data.tokens import CodeAlpacaDataset
from model.demo import EMBEDDED_BASE
from model.engine.ranks import ALONE
from model.evaluation.config import SamplingConfig
from model.net.gpt import GPTModel
from model.net.tokenizer import load_tokenizer
from tasks.humaneval import score_tasks
from tasks.row_tests import RowTests
from tasks.scoring import outputs_of


class _Rows(SimpleNamespace):
    """What the completions need of a test split."""

    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize(("value", "texts"), [(1.0, 2), (float("nan"), 0)])
def test_a_model_whose_logits_are_not_finite_has_no_completions(value: float, texts: int) -> None:
    """It has losses and a reason instead."""
    model = GPTModel.from_pretrained(EMBEDDED_BASE)
    with torch.no_grad():
        model.ln_f.weight[0] = value
    tokenizer = load_tokenizer(EMBEDDED_BASE, model.config.vocab_size)
    rows: list[dict[str, Any]] = [{"prompt": "Write a function."}, {"prompt": "Add 1.", "tests": ["assert True"]}]
    test = cast(CodeAlpacaDataset, _Rows(rows=rows))
    settings = SamplingConfig(max_new_tokens=3)
    found = outputs_of(np.ones(2), model, tokenizer, test, settings, torch.float32, ALONE)
    assert (found.losses, len(found.sampled), len(found.greedy), found.tasks) == ([1.0, 1.0], texts, texts // 2, [])
    assert found.refusal.startswith("the model's logits are not finite") == (not texts)


def test_tasks_that_one_model_did_not_complete_are_not_scored() -> None:
    assert score_tasks([[]], [], SamplingConfig(humaneval_samples=1), RowTests({}), logging.getLogger(__name__)) == []
