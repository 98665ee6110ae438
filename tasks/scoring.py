"""Outputs of base and tuned model on the test rows: losses and completions, by one process or by several ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
class ModelOutputs:
    """Losses and completions of one model.

    Attributes:
        losses: of each test row, summed over its response, in nats.
        sampled: completions of the first ``sample_rows`` rows by their position, drawn as the parameters say.
        greedy: completions of the first ``pass_rows`` rows with tests.
        tasks: completions of each task of HumanEval; empty without it.
        refusal: why there are no completions: the model's logits are not finite; empty if there are.
    """

    losses: list[float]
    sampled: dict[int, Completion]
    greedy: dict[int, Completion]
    tasks: list[list[Completion]]
    refusal: str = ""


@dataclass(frozen=True)
class BothOutputs:
    """Losses and completions of both models.

    Attributes:
        tokens: of each test row's response.
    """

    tokens: list[int]
    base: ModelOutputs
    tuned: ModelOutputs


@dataclass(frozen=True)
class Scoring:
    """What is to be scored.

    Attributes:
        training: of the tuned model.
        best: directory of the checkpoint to score.
        micro_batch_tokens: tokens per pass, about.
        sampling: which rows, and how they are completed.
        base: outputs of the base, if they are known.
    """

    training: TrainingRef
    best: str
    micro_batch_tokens: int
    sampling: SamplingConfig
    base: ModelOutputs | None = None

    @property
    def rows(self) -> CodeAlpacaDataset:
        """The test rows that are scored."""
        return CodeAlpacaDataset(Path(self.training.tokens.directory), "test", limit=self.sampling.score_rows)

    def completions(self) -> int:
        """How many completions are to be made."""
        test = self.rows
        sampled, tested = _chosen(test, self.sampling)
        drawn = len({*sampled, *tested}) if self.sampling.temperature == 0 else len(sampled) + len(tested)
        models = 1 if self.base else 2
        return models * (drawn + 164 * self.sampling.humaneval_samples)


def score_models(scoring: Scoring, place: torch.device, cache: TrunkCacheConfig, ranks: Ranks = ALONE) -> BothOutputs:
    """Score and complete the test rows by the base, unless its outputs are known, and by the tuned model.

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
    uses = 1 if scoring.base else 2
    trunk = TrunkOutputs(engine, test, np.arange(len(test)), max_tokens, uses=uses, config=cache, ranks=ranks)
    fill_together(trunk, np.arange(len(test)))
    if (base := scoring.base) is None:
        base_losses, _ = row_losses(engine, test, max_tokens, trunk, ranks)
        base = outputs_of(base_losses, network, tokenizer, test, sampling, dtype, ranks)
    load_trained(Path(scoring.best), network)
    tuned_losses, tokens = row_losses(engine, test, max_tokens, trunk, ranks)
    del trunk  # the completions need its memory
    tuned = outputs_of(tuned_losses, network, tokenizer, test, sampling, dtype, ranks)
    return BothOutputs(tokens.tolist(), base, tuned)


def outputs_of(
    losses: np.ndarray,
    network: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    test: CodeAlpacaDataset,
    sampling: SamplingConfig,
    dtype: torch.dtype,
    ranks: Ranks,
) -> ModelOutputs:
    """Complete the prompts; where sampling is greedy too, each prompt once.

    A model whose logits are not finite is a result, as its losses are, and its training is worth a report.
    """
    sampled, tested = _chosen(test, sampling)

    def draw(indices: Sequence[int], config: SamplingConfig) -> dict[int, Completion]:
        prompts = {index: test.rows[index]["prompt"] for index in indices}
        mine = _share(prompts, ranks)

        def make() -> dict[int, Completion]:
            found = complete(network, tokenizer, [prompts[index] for index in mine], config, dtype)
            return dict(zip(mine, found, strict=True))

        made = {index: each for part in ranks.gather_made(make, ArithmeticError) for index, each in part.items()}
        return {index: made[index] for index in indices}

    try:
        if sampling.temperature == 0:
            found = draw(sorted({*sampled, *tested}), sampling)
            of_sampled, of_tested = {row: found[row] for row in sampled}, {row: found[row] for row in tested}
        else:
            of_sampled, of_tested = draw(sampled, sampling), draw(tested, replace(sampling, temperature=0.0))
        tasks = complete_tasks(network, tokenizer, sampling, dtype, ranks)
    except ArithmeticError as error:
        return ModelOutputs(losses.tolist(), {}, {}, [], str(error))
    return ModelOutputs(losses.tolist(), of_sampled, of_tested, tasks)


def _chosen(test: CodeAlpacaDataset, sampling: SamplingConfig) -> tuple[list[int], list[int]]:
    """The rows whose prompts are completed, and those whose greedy completions are run."""
    tested = [index for index, row in enumerate(test.rows) if row.get("tests")][: sampling.pass_rows]
    return list(range(len(test)))[: sampling.sample_rows], tested


def _share(prompts: Mapping[int, str], ranks: Ranks) -> list[int]:
    """This rank's rows. Equal prompts stay together: the random numbers of a row depend on how many precede it."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts.values()))}
    return [index for index, prompt in prompts.items() if numbers[prompt] % ranks.world == ranks.rank]


def write_outputs(path: Path, outputs: BothOutputs) -> None:
    """Write the outputs of both models as JSON."""
    write_json(path, asdict(outputs))


def read_outputs(path: Path) -> BothOutputs:
    """What ``write_outputs`` wrote."""
    return TypeAdapter(BothOutputs).validate_python(json.loads(read_bytes(path)))
