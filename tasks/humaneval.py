"""HumanEval within the evaluation: both models' completions of its tasks, run in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from model.engine.ranks import ALONE, Ranks
from model.evaluation.completions import Completion
from model.evaluation.config import SamplingConfig
from model.evaluation.humaneval import sample_tasks, task_records, tasks
from model.net.gpt import GPTModel
from ops.sandbox.guards import RowResult, Snippet
from tasks.row_tests import RowTests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 3.0  # time limit of a completion, as in Chen et al.'s harness


def complete_tasks(
    network: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingConfig,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> list[list[Completion]]:
    """For each task the completions of a model, made by all ranks; empty without ``humaneval_samples``.

    Raises:
        ArithmeticError: the model's logits are not finite.
    """
    if not sampling.humaneval_samples:
        return []
    chosen = tasks()
    mine = chosen[ranks.rank :: ranks.world]
    parts = ranks.gather_made(lambda: sample_tasks(network, tokenizer, mine, sampling, dtype), ArithmeticError)
    return [parts[number % ranks.world][number // ranks.world] for number in range(len(chosen))]


def score_tasks(
    base: list[list[Completion]],
    tuned: list[list[Completion]],
    sampling: SamplingConfig,
    row_tests: RowTests,
    log: Any,
) -> list[dict[str, Any]]:
    """Run all completions against the tasks' tests: one record per task; empty if a model has no completions."""
    if not base or not tuned:
        return []
    of_base, of_tuned = row_tests.run(_programs(base), _programs(tuned), _SECONDS)
    both = (base, _passes(of_base, log)), (tuned, _passes(of_tuned, log))
    return task_records(tasks(), *both, sampling.humaneval_k)


def _programs(found: Sequence[Sequence[Completion]]) -> list[Snippet]:
    """The completions' programs with their tests, those of a task one after the other."""
    return [
        (task.program(completion.text), task.tests)
        for task, completions in zip(tasks(), found, strict=True)
        for completion in completions
    ]


def _passes(results: Sequence[RowResult], log: Any) -> list[list[bool]]:
    refused = [result for result in results if result.outcome == "not_executed"]
    if refused:
        log.warning("HumanEval: %d completions were not executed: %s", len(refused), refused[0].reason)
    passed = [result.outcome == "passed" for result in results]
    samples = len(results) // len(tasks())
    return [passed[start : start + samples] for start in range(0, len(passed), samples)]
