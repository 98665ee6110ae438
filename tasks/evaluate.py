"""Task ``evaluate`` (tag gpu): score and sample the base and the tuned model on the test split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from model.evaluation.completions import Completion, complete, extract_code
from model.evaluation.config import SamplingConfig
from model.evaluation.scores import Outputs, describe_failures, headline, score_both, score_table
from model.evaluation.tables import pass_table, row_table, sample_table
from model.files import write_json
from model.net.device import resolve_device, use_precision
from model.net.gpt import GPTModel
from ops.sandbox.guards import run_tests
from ops.settings import Settings
from ops.tracking.runs import RunRef, log_metrics
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from tasks.frozen import load_frozen, load_its_tokenizer
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
    """Compare the best checkpoint with the untouched base on the first ``eval_rows`` rows of test; log the scores.

    Raises:
        ValueError: the checkpoint is damaged.
        NotLoggedError: MLflow could not take the scores.
    """
    log = get_run_logger()
    place = resolve_device(device)
    dtype = use_precision(training.config.precision, place)
    test = CodeAlpacaDataset(Path(training.tokens.directory), "test", limit=training.config.eval_rows)
    network = load_frozen(training.model, training.plan, place, dtype)
    tokenizer = load_its_tokenizer(training.model)
    engine = Engine(network, dtype)
    max_tokens = checkpoint.micro_batch_tokens
    cache = TrunkCacheConfig(Settings.load().trunk_outputs, int(trunk_cache_gb * 1e9))
    trunk = TrunkOutputs(engine, test, np.arange(len(test)), max_tokens, uses=2, config=cache)
    base_losses = row_losses(engine, test, max_tokens, trunk)
    base_answers = _answer(network, tokenizer, test, sampling, dtype)
    load_trained(Path(checkpoint.best), network)
    tuned_losses = row_losses(engine, test, max_tokens, trunk)
    del trunk  # the completions need its memory
    tuned_answers = _answer(network, tokenizer, test, sampling, dtype)
    base = _outputs(checkpoint.base_eval_loss, base_losses, base_answers, log)
    tuned = _outputs(checkpoint.best_eval_loss, tuned_losses, tuned_answers, log)
    metrics = score_both(base, tuned) | _facts(base, tuned, checkpoint)
    with must_be_logged(run.tracking_uri, Path(training.directory)):
        log_metrics(run, {name: value for name, value in metrics.items() if name not in headline(metrics)}, step=0)
    for title, before, after, unit in score_table(metrics):
        log.info("%s: base %s, tuned %s %s", title, before, after, f"({unit})" if unit else "")
    if tuned.failures:
        log.info("commonest reasons of failure: %s", describe_failures(tuned.failures))
    directory = Path(checkpoint.directory)
    tables = {
        "test_rows.json": row_table(test.rows, tuned.row_tokens, base.row_losses, tuned.row_losses),
        "samples.json": sample_table(base.sampled_rows, base.sampled_completions, tuned.sampled_completions),
        "pass_rate.json": pass_table(tuned_answers.tested, base.passes, tuned.passes),
    }
    for name, records in tables.items():
        write_json(directory / name, records)
    rows, samples, passes = (str(directory / name) for name in tables)
    return EvaluationRef(metrics, rows, samples, passes, tuned.failures)


@dataclass(frozen=True)
class _Answers:
    """A model's completions of rows of the test split.

    Attributes:
        sampled: the first ``sample_rows`` rows.
        completions: of them, drawn as the parameters say.
        tested: the first ``pass_rows`` rows with tests.
        code: their greedy completions.
    """

    sampled: Sequence[dict[str, Any]]
    completions: Sequence[Completion]
    tested: Sequence[dict[str, Any]]
    code: Sequence[Completion]


def _answer(
    network: GPTModel,
    tokenizer: PreTrainedTokenizerBase,
    test: CodeAlpacaDataset,
    sampling: SamplingConfig,
    dtype: torch.dtype,
) -> _Answers:
    sampled = test.rows[: sampling.sample_rows]
    tested = [row for row in test.rows if row.get("tests")][: sampling.pass_rows]
    greedy = replace(sampling, temperature=0.0)
    return _Answers(
        sampled,
        complete(network, tokenizer, [row["prompt"] for row in sampled], sampling, dtype),
        tested,
        complete(network, tokenizer, [row["prompt"] for row in tested], greedy, dtype),
    )


def _outputs(validation_loss: float, losses: tuple[np.ndarray, np.ndarray], answers: _Answers, log: Any) -> Outputs:
    """All that a model's scores are computed from. The completions of rows with tests are run in the sandbox."""
    verdicts = run_tests(
        [(extract_code(code.text), row["tests"]) for row, code in zip(answers.tested, answers.code, strict=True)]
    )
    refused = [verdict for verdict in verdicts if verdict.outcome == "not_executed"]
    if refused:
        log.warning("%d of %d completions were not executed: %s", len(refused), len(verdicts), refused[0].reason)
    return Outputs(
        validation_loss=validation_loss,
        row_losses=losses[0],
        row_tokens=losses[1],
        sampled_rows=answers.sampled,
        sampled_completions=answers.completions,
        passes=[verdict.outcome == "passed" for verdict in verdicts],
        not_executed=len(refused),
        failures=dict(Counter(verdict.reason for verdict in verdicts if verdict.outcome != "passed").most_common(3)),
    )


def _facts(base: Outputs, tuned: Outputs, checkpoint: CheckpointRef) -> dict[str, float]:
    """Metrics that are no scores: counts, the best step, the base's perplexity on the validation split."""
    facts: dict[str, float] = {
        "base/perplexity": perplexity(checkpoint.base_eval_loss),
        "best/step": checkpoint.best_step,
        "test/rows": len(tuned.row_losses),
    }
    if tuned.passes:
        facts |= {"base/not_executed": base.not_executed, "sample/not_executed": tuned.not_executed}
    return facts
