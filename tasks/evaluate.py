"""Task ``evaluate`` (tag gpu): score and sample the base and the tuned model on the test split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.tokens import CodeAlpacaDataset
from model.engine.scoring import perplexity
from model.evaluation.comparison import Difference, compare, judge
from model.evaluation.completions import extract_code
from model.evaluation.config import SamplingConfig
from model.evaluation.records import Answers, build_records, references_of
from model.evaluation.scores import HUMANEVAL, UNTUNED, Record, describe_failures, headline, score_both
from model.evaluation.tables import common_failures, pass_table, sample_table, score_table
from model.files import write_json
from model.net.device import resolve_device
from ops.display import SHOWN
from ops.sandbox.guards import RowResult, Snippet
from ops.settings import Settings
from ops.tracking.runs import RunRef, log_metrics
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from tasks.base_outputs import BaseOutputs
from tasks.frozen import load_its_tokenizer
from tasks.gang import Devices, score
from tasks.humaneval import score_tasks
from tasks.references import CheckpointRef, EvaluationRef, TrainingRef
from tasks.row_tests import RowTests
from tasks.scoring import BothOutputs, ModelOutputs, Scoring


@task(name="evaluate", tags=["gpu"], retries=1, retry_delay_seconds=10, cache_policy=NO_CACHE)
@pipeline_step
def evaluate(
    run: RunRef,
    training: TrainingRef,
    checkpoint: CheckpointRef,
    sampling: SamplingConfig,
    devices: Devices,
    trunk_cache_gb: float,
) -> EvaluationRef:
    """Compare the best checkpoint with the untouched base on the first ``score_rows`` rows of test; log the scores.

    With several devices and many completions, ranks share the rows.

    Raises:
        ValueError: the checkpoint is damaged.
        NotLoggedError: MLflow could not take the scores.
    """
    log = get_run_logger()
    scoring = Scoring(training, checkpoint.best, checkpoint.micro_batch_tokens, sampling)
    test = scoring.rows
    log.info("scoring %d rows of the test split; score_rows and sample_rows limit them", len(test))
    store = BaseOutputs(Settings.load().base_outputs, scoring, resolve_device(devices.first))
    kept = store.find(log)
    outputs = score(replace(scoring, base=kept.outputs if kept else None), devices, trunk_cache_gb, log)
    for name, each in (("base", outputs.base), ("tuned model", outputs.tuned)):
        if each.refusal:
            log.warning("the %s has no completions: %s", name, each.refusal)
    row_tests = RowTests(kept.results if kept else {})
    (base, base_refused), (tuned, refused) = _answers(test, outputs, row_tests, log)
    tokenizer, tokens = load_its_tokenizer(training.model), np.array(outputs.tokens)
    records = build_records(references_of(test, tokenizer, tokens, sampling.max_new_tokens), base, tuned)
    task_records = score_tasks(outputs.base.tasks, outputs.tuned.tasks, sampling, row_tests, log)
    if kept is None or kept.results != row_tests.of_base:
        store.keep(kept.made_by if kept else run.run_id, outputs.base, row_tests.of_base, log)
    tasks = compare(task_records, sampling.seed, scoreboard=HUMANEVAL)
    differences = judge([*compare(records, sampling.seed), *tasks])
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


def _answers(
    test: CodeAlpacaDataset, outputs: BothOutputs, row_tests: RowTests, log: Any
) -> list[tuple[Answers, int]]:
    """What each model gave on each row, and how many of its completions could not be executed.

    The greedy completions of rows with tests are run in the sandbox.
    """

    def snippets(of: ModelOutputs) -> list[Snippet]:
        return [(extract_code(found.text), test.rows[index]["tests"]) for index, found in of.greedy.items()]

    both = outputs.base, outputs.tuned
    results = row_tests.run(snippets(outputs.base), snippets(outputs.tuned))
    return [_answers_of(test, each, its, log) for each, its in zip(both, results, strict=True)]


def _answers_of(
    test: CodeAlpacaDataset, outputs: ModelOutputs, found: Sequence[RowResult], log: Any
) -> tuple[Answers, int]:
    results = dict(zip(outputs.greedy, found, strict=True))
    refused = [result for result in results.values() if result.outcome == "not_executed"]
    if refused:
        log.warning("%d of %d completions were not executed: %s", len(refused), len(results), refused[0].reason)
    rows = range(len(test))
    passed = {index: result.outcome == "passed" for index, result in results.items()}
    failures = {index: result.reason for index, result in results.items() if not passed[index]}
    answers = Answers(
        losses=np.array(outputs.losses),
        completions=[outputs.sampled.get(index) for index in rows],
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
