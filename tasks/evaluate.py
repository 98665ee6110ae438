"""Task ``evaluate`` (tag gpu): score and sample the base and the tuned model on the test split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.tokens import CodeAlpacaDataset
from model.engine.checkpoint import load_trained
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.scoring import mean_loss, perplexity, row_losses
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.evaluation.completions import SamplingConfig, complete, pass_table, row_table, sample_table
from model.files import write_json
from model.net.device import resolve_device, resolve_precision
from model.net.freezing import FreezePlan
from ops.sandbox.guards import run_tests
from ops.settings import Settings
from tasks.frozen import load_frozen
from tasks.references import CheckpointRef, EvaluationRef, ModelRef, TokensRef


@task(name="evaluate", tags=["gpu"], retries=1, retry_delay_seconds=10, cache_policy=NO_CACHE)
def evaluate(
    tokens: TokensRef,
    model: ModelRef,
    plan: FreezePlan,
    checkpoint: CheckpointRef,
    config: TrainConfig,
    sampling: SamplingConfig,
    device: str,
    trunk_cache_gb: float,
) -> EvaluationRef:
    """Compare the best checkpoint with the untouched base: loss on the first eval_rows rows, completions for some.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    log = get_run_logger()
    place = resolve_device(device)
    dtype = resolve_precision(config.precision, place)
    test = CodeAlpacaDataset(Path(tokens.directory), "test", limit=config.eval_rows)
    prompts = [row["prompt"] for row in test.rows[: sampling.sample_rows]]
    tested = [row for row in test.rows if row.get("tests")][: sampling.pass_rows]
    requests = [row["prompt"] for row in tested]
    greedy = replace(sampling, temperature=0.0)
    network, tokenizer = load_frozen(model, plan, place, dtype)
    engine = Engine(network, dtype)
    max_tokens = checkpoint.micro_batch_tokens
    cache = TrunkCacheConfig(Settings.load().trunk_outputs, int(trunk_cache_gb * 1e9))
    trunk = TrunkOutputs(engine, test, np.arange(len(test)), max_tokens, uses=2, config=cache)
    base = row_losses(engine, test, max_tokens, trunk)
    base_samples = complete(network, tokenizer, prompts, sampling, dtype)
    base_code = complete(network, tokenizer, requests, greedy, dtype)
    load_trained(Path(checkpoint.best), network)
    tuned = row_losses(engine, test, max_tokens, trunk)
    del trunk  # completions need the memory
    tuned_samples = complete(network, tokenizer, prompts, sampling, dtype)
    tuned_code = complete(network, tokenizer, requests, greedy, dtype)
    metrics = {
        "base/eval_loss": checkpoint.base_eval_loss,
        "base/perplexity": perplexity(checkpoint.base_eval_loss),
        "best/eval_loss": checkpoint.best_eval_loss,
        "best/step": checkpoint.best_step,
        "base/test_loss": mean_loss(*base),
        "base/test_perplexity": perplexity(mean_loss(*base)),
        "test/loss": mean_loss(*tuned),
        "test/perplexity": perplexity(mean_loss(*tuned)),
        "test/rows": len(test),
    }
    if prompts:
        metrics["base/stop_rate"] = sum(stopped for _, stopped in base_samples) / len(prompts)
        metrics["sample/stop_rate"] = sum(stopped for _, stopped in tuned_samples) / len(prompts)
    (base_passes, base_refused), (tuned_passes, tuned_refused) = (
        _passes(tested, code, log) for code in (base_code, tuned_code)
    )
    if tested:
        metrics["base/not_executed"] = base_refused
        metrics["sample/not_executed"] = tuned_refused
        metrics["base/pass_rate"] = sum(base_passes) / len(tested)
        metrics["sample/pass_rate"] = sum(tuned_passes) / len(tested)
        log.info("pass rate %.3f, the base's %.3f", metrics["sample/pass_rate"], metrics["base/pass_rate"])
    rows_file = Path(checkpoint.directory) / "test_rows.json"
    samples_file = Path(checkpoint.directory) / "samples.json"
    passes_file = Path(checkpoint.directory) / "pass_rate.json"
    write_json(passes_file, pass_table(tested, base_passes, tuned_passes))
    write_json(rows_file, row_table(test, base, tuned))
    write_json(samples_file, sample_table(test.rows[: sampling.sample_rows], base_samples, tuned_samples))
    log.info(
        "test loss %.4f, the base's %.4f, over %d rows", metrics["test/loss"], metrics["base/test_loss"], len(test)
    )
    return EvaluationRef(metrics, str(rows_file), str(samples_file), str(passes_file))


def _passes(rows: list[dict[str, Any]], completions: list[tuple[str, bool]], log: Any) -> tuple[list[bool], int]:
    """Which completions pass their row's tests, sandboxed, and how many could not be executed, and so did not."""
    verdicts = run_tests([(code, row["tests"]) for row, (code, _) in zip(rows, completions, strict=True)])
    refused = [verdict for verdict in verdicts if verdict.outcome == "not_executed"]
    if refused:
        log.warning("%d of %d completions were not executed: %s", len(refused), len(rows), refused[0].reason)
    return [verdict.outcome == "passed" for verdict in verdicts], len(refused)
