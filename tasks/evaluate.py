"""Task ``evaluate`` (tag gpu): score and sample the base and the tuned model on the test split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.tokens import CodeAlpacaDataset
from model.engine.checkpoint import load_trained
from model.engine.engine import Engine
from model.engine.scoring import perplexity, row_losses
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.evaluation.comparison import Difference, compare
from model.evaluation.completions import Completion, complete, extract_code
from model.evaluation.config import SamplingConfig
from model.evaluation.records import Answers, build_records, references_of
from model.evaluation.scores import HUMANEVAL, UNTUNED, Record, describe_failures, headline, score_both
from model.evaluation.tables import common_failures, pass_table, sample_table, score_table
from model.files import write_json
from model.net.device import resolve_device, use_precision
from model.net.gpt import GPTModel
from ops.display import SHOWN
from ops.sandbox.guards import run_tests
from ops.settings import Settings
from ops.tracking.runs import RunRef, log_metrics
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from tasks.frozen import load_frozen, load_its_tokenizer
from tasks.humaneval import complete_tasks, score_tasks
from tasks.references import CheckpointRef, EvaluationRef, TrainingRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task(name="evaluate", tags=["gpu"], retries=1, retry_delay_seconds=10, cache_policy=NO_CACHE)
@pipeline_step
def evaluate(
    run: RunRef,
    training: TrainingRef,
    checkpoint: CheckpointRef,
    sampling: SamplingConfig,
    device: str,
    trunk_cache_gb: float,
) -> EvaluationRef:
    """Compare the best checkpoint with the untouched base on the first ``score_rows`` rows of test; log the scores.

    Raises:
        ValueError: the checkpoint is damaged.
        NotLoggedError: MLflow could not take the scores.
    """
    log = get_run_logger()
    place = resolve_device(device)
    dtype = use_precision(training.config.precision, place)
    test = CodeAlpacaDataset(Path(training.tokens.directory), "test", limit=sampling.score_rows)
    log.info("scoring %d rows of the test split; score_rows and sample_rows limit them", len(test))
    network = load_frozen(training.model, training.plan, place, dtype)
    tokenizer = load_its_tokenizer(training.model)
    engine = Engine(network, dtype)
    max_tokens = checkpoint.micro_batch_tokens
    cache = TrunkCacheConfig(Settings.load().trunk_outputs, int(trunk_cache_gb * 1e9))
    trunk = TrunkOutputs(engine, test, np.arange(len(test)), max_tokens, uses=2, config=cache)
    base_losses, tokens = row_losses(engine, test, max_tokens, trunk)
    base_texts = _complete(network, tokenizer, test, sampling, dtype)
    base_tasks = complete_tasks(network, tokenizer, sampling, dtype)
    load_trained(Path(checkpoint.best), network)
    tuned_losses, _ = row_losses(engine, test, max_tokens, trunk)
    del trunk  # the completions need its memory
    tuned_texts = _complete(network, tokenizer, test, sampling, dtype)
    tuned_tasks = complete_tasks(network, tokenizer, sampling, dtype)
    (base, base_refused), (tuned, refused) = (
        _answers(test, losses, texts, log)
        for losses, texts in ((base_losses, base_texts), (tuned_losses, tuned_texts))
    )
    records = build_records(references_of(test, tokenizer, tokens, sampling.max_new_tokens), base, tuned)
    task_records = score_tasks(base_tasks, tuned_tasks, sampling, log)
    differences = compare(records, sampling.seed) + compare(task_records, sampling.seed, scoreboard=HUMANEVAL)
    metrics = score_both(records) | score_both(task_records, HUMANEVAL) | _facts(records, checkpoint)
    if any(passed is not None for passed in tuned.passed):
        metrics |= {"untuned/not_executed": base_refused, "sample/not_executed": refused}
    with must_be_logged(run.tracking_uri, Path(training.directory)):
        # MLflow's page of a run has metrics in this order.
        names = sorted(metrics.keys() - headline(metrics).keys(), key=lambda name: (name.startswith(UNTUNED), name))
        log_metrics(run, {name: metrics[name] for name in names}, step=0)
    _say(metrics, differences, records, log)
    directory = Path(checkpoint.directory)

    def written(name: str, table: list[dict[str, Any]]) -> str:
        write_json(directory / name, table)
        return str(directory / name)

    return EvaluationRef(
        metrics=metrics,
        differences=tuple(differences),
        rows=written("rows.json", records),
        samples=written("samples.json", sample_table(records)),
        passes=written("pass_rate.json", pass_table(records)),
        humaneval=written("humaneval.json", task_records),
        failures=common_failures(records),
    )


def _say(
    metrics: Mapping[str, float], differences: Sequence[Difference], records: Sequence[Record], log: Any
) -> None:
    """Log the scores, and what is wrong with them."""
    for line in score_table(metrics, differences):
        change = f", {line.difference} ({line.interval}), {line.verdict}" if line.difference else ""
        log.info("%s: base %s, tuned %s%s", line.title, line.base, line.tuned, change, extra=SHOWN)
    if failures := common_failures(records):
        log.info("commonest reasons of failure: %s", describe_failures(failures))
    broken = [record["row"] for record in records if math.isinf(record["base_loss"] + record["loss"])]
    if broken:
        log.warning(
            "the loss of %d test rows is not finite, the first is row %d: not compared", len(broken), broken[0]
        )


@dataclass(frozen=True)
class _Texts:
    """A model's completions of rows of the test split, by the rows' position.

    Attributes:
        sampled: of the first ``sample_rows`` rows, drawn as the parameters say.
        greedy: of the first ``pass_rows`` rows with tests.
    """

    sampled: dict[int, Completion]
    greedy: dict[int, Completion]


def _complete(
    network: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    test: CodeAlpacaDataset,
    sampling: SamplingConfig,
    dtype: torch.dtype,
) -> _Texts:
    """Complete the prompts; where sampling is greedy too, each prompt once."""
    sampled = list(range(len(test)))[: sampling.sample_rows]
    tested = [index for index, row in enumerate(test.rows) if row.get("tests")][: sampling.pass_rows]

    def draw(indices: list[int], config: SamplingConfig) -> dict[int, Completion]:
        found = complete(network, tokenizer, [test.rows[index]["prompt"] for index in indices], config, dtype)
        return dict(zip(indices, found, strict=True))

    if sampling.temperature == 0:
        found = draw(sorted({*sampled, *tested}), sampling)
        return _Texts({index: found[index] for index in sampled}, {index: found[index] for index in tested})
    return _Texts(draw(sampled, sampling), draw(tested, replace(sampling, temperature=0.0)))


def _answers(test: CodeAlpacaDataset, losses: np.ndarray, texts: _Texts, log: Any) -> tuple[Answers, int]:
    """What a model gave on each row, and how many completions could not be executed.

    The greedy completions of rows with tests are run in the sandbox.
    """
    snippets = [(extract_code(found.text), test.rows[index]["tests"]) for index, found in texts.greedy.items()]
    results = dict(zip(texts.greedy, run_tests(snippets), strict=True))
    refused = [result for result in results.values() if result.outcome == "not_executed"]
    if refused:
        log.warning("%d of %d completions were not executed: %s", len(refused), len(results), refused[0].reason)
    rows = range(len(test))
    passed = {index: result.outcome == "passed" for index, result in results.items()}
    failures = {index: result.reason for index, result in results.items() if not passed[index]}
    answers = Answers(
        losses=losses,
        completions=[texts.sampled.get(index) for index in rows],
        passed=[passed.get(index) for index in rows],
        failures=[failures.get(index) for index in rows],
    )
    return answers, len(refused)


def _facts(records: Sequence[Record], checkpoint: CheckpointRef) -> dict[str, float]:
    """Metrics that are no scores of test rows."""
    return {
        "untuned/eval_loss": checkpoint.base_eval_loss,
        "best/eval_loss": checkpoint.best_eval_loss,
        "untuned/perplexity": perplexity(checkpoint.base_eval_loss),
        "best/step": checkpoint.best_step,
        "test/rows": len(records),
    }
