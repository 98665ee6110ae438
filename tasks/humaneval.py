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
from ops.sandbox.guards import run_tests

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
    """For each task the completions of a model, made by all ranks; empty without ``humaneval_samples``."""
    if not sampling.humaneval_samples:
        return []
    chosen = tasks()
    parts = ranks.gather(sample_tasks(network, tokenizer, chosen[ranks.rank :: ranks.world], sampling, dtype))
    return [parts[number % ranks.world][number // ranks.world] for number in range(len(chosen))]


def score_tasks(
    base: list[list[Completion]], tuned: list[list[Completion]], sampling: SamplingConfig, log: Any
) -> list[dict[str, Any]]:
    """Run all completions against the tasks' tests: one record per task; empty without completions."""
    if not base:
        return []
    both = (base, _passes(base, log)), (tuned, _passes(tuned, log))
    return task_records(tasks(), *both, sampling.humaneval_k)


def _passes(found: Sequence[Sequence[Completion]], log: Any) -> list[list[bool]]:
    chosen = tasks()
    snippets = [
        (task.program(completion.text), task.tests)
        for task, completions in zip(chosen, found, strict=True)
        for completion in completions
    ]
    results = run_tests(snippets, _SECONDS)
    refused = [result for result in results if result.outcome == "not_executed"]
    if refused:
        log.warning("HumanEval: %d completions were not executed: %s", len(refused), refused[0].reason)
    passed = [result.outcome == "passed" for result in results]
    samples = len(snippets) // len(chosen)
    return [passed[start : start + samples] for start in range(0, len(passed), samples)]
