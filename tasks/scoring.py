"""What base and tuned model give on the test rows: losses and completions, by one process or by several ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import TypeAdapter

from model.data.tokens import CodeAlpacaDataset
from model.engine.checkpoint import load_trained
from model.engine.engine import Engine
from model.engine.ranks import ALONE, Ranks
from model.engine.scoring import row_losses
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.engine.trunk_filling import fill_together
from model.evaluation.completions import Completion, complete
from model.evaluation.config import SamplingConfig
from model.files import read_bytes, write_json
from model.net.device import use_precision
from model.net.gpt import GPTModel
from tasks.frozen import load_frozen, load_its_tokenizer
from tasks.humaneval import complete_tasks
from tasks.references import TrainingRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Given:
    """What one model gives.

    Attributes:
        losses: of each test row, summed over its response, in nats.
        sampled: completions of the first ``sample_rows`` rows by their position, drawn as the parameters say.
        greedy: completions of the first ``pass_rows`` rows with tests.
        tasks: completions of each task of HumanEval; empty without it.
    """

    losses: list[float]
    sampled: dict[int, Completion]
    greedy: dict[int, Completion]
    tasks: list[list[Completion]]


@dataclass(frozen=True)
class BothGiven:
    """What both models give.

    Attributes:
        tokens: of each test row's response.
    """

    tokens: list[int]
    base: Given
    tuned: Given


@dataclass(frozen=True)
class Scoring:
    """What is to be scored.

    Attributes:
        training: of the tuned model.
        best: directory of the checkpoint to score.
        micro_batch_tokens: tokens per pass, about.
        sampling: which rows, and how they are completed.
    """

    training: TrainingRef
    best: str
    micro_batch_tokens: int
    sampling: SamplingConfig

    @property
    def rows(self) -> CodeAlpacaDataset:
        """The test rows that are scored."""
        return CodeAlpacaDataset(Path(self.training.tokens.directory), "test", limit=self.sampling.score_rows)

    def completions(self) -> int:
        """How many completions both models make."""
        test = self.rows
        sampled, tested = _chosen(test, self.sampling)
        drawn = len({*sampled, *tested}) if self.sampling.temperature == 0 else len(sampled) + len(tested)
        return 2 * (drawn + 164 * self.sampling.humaneval_samples)


def give(scoring: Scoring, place: torch.device, cache: TrunkCacheConfig, ranks: Ranks = ALONE) -> BothGiven:
    """Score and complete the test rows by the base and by the tuned model.

    Several ranks share the packs and the prompts, and each returns everything. The losses have the bits of one
    process. A completion depends on the other prompts of its process by rounding only (``model.generation``).

    Raises:
        ValueError: the checkpoint is damaged.
    """
    training, sampling = scoring.training, scoring.sampling
    dtype = use_precision(training.config.precision, place)
    test = scoring.rows
    network = load_frozen(training.model, training.plan, place, dtype)
    tokenizer = load_its_tokenizer(training.model)
    engine = Engine(network, dtype)
    max_tokens = scoring.micro_batch_tokens
    trunk = TrunkOutputs(engine, test, np.arange(len(test)), max_tokens, uses=2, config=cache, ranks=ranks)
    fill_together(trunk, np.arange(len(test)))
    base_losses, tokens = row_losses(engine, test, max_tokens, trunk, ranks)
    base = _given(base_losses, network, tokenizer, test, sampling, dtype, ranks)
    load_trained(Path(scoring.best), network)
    tuned_losses, _ = row_losses(engine, test, max_tokens, trunk, ranks)
    del trunk  # the completions need its memory
    tuned = _given(tuned_losses, network, tokenizer, test, sampling, dtype, ranks)
    return BothGiven(tokens.tolist(), base, tuned)


def _given(
    losses: np.ndarray,
    network: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    test: CodeAlpacaDataset,
    sampling: SamplingConfig,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Given:
    """Complete the prompts; where sampling is greedy too, each prompt once."""
    sampled, tested = _chosen(test, sampling)

    def draw(indices: Sequence[int], config: SamplingConfig) -> dict[int, Completion]:
        prompts = [test.rows[index]["prompt"] for index in indices]
        mine = _share(indices, prompts, ranks)
        found = complete(network, tokenizer, [test.rows[index]["prompt"] for index in mine], config, dtype)
        merged = {
            index: each for part in ranks.gather(dict(zip(mine, found, strict=True))) for index, each in part.items()
        }
        return {index: merged[index] for index in indices}

    if sampling.temperature == 0:
        found = draw(sorted({*sampled, *tested}), sampling)
        of_sampled, of_tested = {index: found[index] for index in sampled}, {index: found[index] for index in tested}
    else:
        of_sampled, of_tested = draw(sampled, sampling), draw(tested, replace(sampling, temperature=0.0))
    return Given(losses.tolist(), of_sampled, of_tested, complete_tasks(network, tokenizer, sampling, dtype, ranks))


def _chosen(test: CodeAlpacaDataset, sampling: SamplingConfig) -> tuple[list[int], list[int]]:
    """The rows whose prompts are completed, and those whose greedy completions are run."""
    tested = [index for index, row in enumerate(test.rows) if row.get("tests")][: sampling.pass_rows]
    return list(range(len(test)))[: sampling.sample_rows], tested


def _share(indices: Sequence[int], prompts: Sequence[str], ranks: Ranks) -> list[int]:
    """This rank's rows. Equal prompts stay together: the random numbers of a row depend on how many precede it."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [
        index for index, prompt in zip(indices, prompts, strict=True) if numbers[prompt] % ranks.world == ranks.rank
    ]


def write_given(path: Path, given: BothGiven) -> None:
    """Write what both models give as JSON."""
    write_json(path, asdict(given))


def read_given(path: Path) -> BothGiven:
    """What ``write_given`` wrote."""
    return TypeAdapter(BothGiven).validate_python(json.loads(read_bytes(path)))
