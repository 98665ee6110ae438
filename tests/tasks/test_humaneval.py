"""HumanEval in the evaluation: a model's completions are run, and the records can be compared."""

from __future__ import annotations

import logging

import pytest
import torch

from model.demo import EMBEDDED_BASE
from model.evaluation.comparison import compare
from model.evaluation.completions import Completion
from model.evaluation.config import SamplingConfig
from model.evaluation.humaneval import Task
from model.evaluation.scores import HUMANEVAL, score_both
from model.net.gpt import GPTModel
from model.net.tokenizer import load_tokenizer
from tasks import humaneval
from tasks.humaneval import complete_tasks, score_tasks
from tasks.row_tests import RowTests

LOG = logging.getLogger(__name__)
TASKS = [
    Task(
        f"T/{number}",
        f"def f{number}(x):\n",
        f"f{number}",
        "    return x\n",
        f"def check(c):\n    assert c({number}) == {number}",
    )
    for number in range(3)
]
RIGHT, WRONG = Completion("    return x", True), Completion("    return -1", True)


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "tasks", lambda: TASKS)


def test_both_models_are_scored() -> None:
    """Samples stay with their task: 0, 1 and 2 of 2 pass; the values and the difference have their names."""
    base = [[WRONG, WRONG]] * 3
    tuned = [[WRONG, WRONG], [WRONG, RIGHT], [RIGHT, RIGHT]]
    records = score_tasks(base, tuned, SamplingConfig(humaneval_samples=2, humaneval_k=2), RowTests({}), LOG)
    assert [(r["base_passes"], r["passes"], r["pass_at_k"]) for r in records] == [
        (0, 0, 0.0),
        (0, 1, 1.0),
        (0, 2, 1.0),
    ]
    assert score_both(records, HUMANEVAL) == pytest.approx(
        {
            "untuned/humaneval_pass_at_1": 0.0, "humaneval/pass_at_1": 0.5,
            "untuned/humaneval_pass_at_k": 0.0, "humaneval/pass_at_k": 2 / 3,
        }
    )  # fmt: skip
    found = {each.score: each for each in compare(records, 0, scoreboard=HUMANEVAL)}
    assert found["humaneval_pass_at_1"].difference == pytest.approx(0.5)
    assert found["humaneval_pass_at_1"].rows == 3


def test_it_is_off_by_default() -> None:
    """Nothing is drawn and nothing is reported."""
    model = GPTModel.from_pretrained(EMBEDDED_BASE)
    tokenizer = load_tokenizer(EMBEDDED_BASE, model.config.vocab_size)
    assert complete_tasks(model, tokenizer, SamplingConfig(), torch.float32) == []
    assert score_tasks([], [], SamplingConfig(), RowTests({}), LOG) == []
    assert compare([], 0, scoreboard=HUMANEVAL) == []
    drawn = complete_tasks(model, tokenizer, SamplingConfig(humaneval_samples=2), torch.float32)
    assert [len(samples) for samples in drawn] == [2, 2, 2]
