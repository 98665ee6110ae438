"""The scoreboard: every score of a model, in one list that all tables, cards and MLflow's names are made from.

Scores are computed from records, one for each row of the test split (``model.evaluation.records``). Each is a ratio
of two sums over rows, so that rows can be drawn again for intervals (``model.evaluation.comparison``). To add a
score, fill its column in ``model.evaluation.records`` and add its entry to SCOREBOARD. docs/evaluation.md defines
each score, and docs/architecture.md names the tests and pages that list scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.engine.scoring import perplexity

# Begins MLflow's names of what a training does not change. MLflow sorts its charts by name, and these come last.
UNTUNED = "untuned/"
Array = np.ndarray[Any, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """An entry of the scoreboard.

    Attributes:
        name: unique; also the column of the records that it is computed from, unless ``column`` says otherwise.
        title: for tables, 16 characters at most.
        base: MLflow's name for the untouched base's value.
        tuned: MLflow's name for the tuned model's value.
        form: format specification of the value in tables.
        unit: of the value; empty for a plain number.
        higher_is_better: the direction; None where neither is better.
        source: definition or citation, shown in the model card.
        headline: a score that decides between versions: ``publish`` logs it with the model, and the description of
            the registered version shows it.
        column: of the records: the tuned model's value of a row; the base's is in ``base_<column>``.
        per: column of the weights; the score is the sum of ``column`` over the sum of ``per``. None counts rows.
        finish: turns that ratio into the score.
        change: turns the ratio under the old model and the difference of the ratios (new - old) into the difference
            of the scores. It is 0 where the ratios are equal.
        test: of the difference: "mcnemar" for a column of true and false, else "bootstrap".
        span: the largest difference that two values can have; intervals end there.
        row_title, row_form, row_unit: of the value of a single row. Without them the title is the name for true and
            false, else ``title``; the form is ``form``, and there is no unit.
        ceiling: column with the value of the reference itself; None where there is none.
    """

    name: str
    title: str
    base: str
    tuned: str
    form: str
    unit: str
    higher_is_better: bool | None
    source: str
    headline: bool = False
    column: str = ""
    per: str | None = None
    finish: Callable[[float], float] = float
    change: Callable[[Array, Array], Array] = lambda old, gain: gain
    test: Literal["mcnemar", "bootstrap"] = "bootstrap"
    span: float = math.inf
    row_title: str = ""
    row_form: str = ""
    row_unit: str = ""
    ceiling: str | None = None

    def __post_init__(self) -> None:
        if not self.column:
            object.__setattr__(self, "column", self.name)
        if not self.row_title:
            object.__setattr__(self, "row_title", self.name if self.test == "mcnemar" else self.title)


def _exp_change(old: Array, gain: Array) -> Array:
    """exp(old + gain) - exp(old), both with the limit of ``perplexity``, so that it is finite."""
    limited = np.where(old < 700.0, np.minimum(gain, 700.0 - old), np.minimum(old + gain, 700.0) - 700.0)
    return np.exp(np.minimum(old, 700.0)) * np.expm1(limited)


VALIDATION_LOSS = Score(
    name="eval_loss",
    title="validation loss",
    base="untuned/eval_loss",
    tuned="best/eval_loss",
    form=".4f",
    unit="nats per token",
    higher_is_better=False,
    source="cross-entropy on response tokens of the validation split; it selects the checkpoint",
    headline=True,
)

SCOREBOARD = (
    Score(
        name="loss",
        title="test loss",
        base="untuned/test_loss",
        tuned="test/loss",
        form=".4f",
        unit="nats per token",
        higher_is_better=False,
        source="cross-entropy on response tokens",
        headline=True,
        per="tokens",
        row_title="summed loss",
        row_form=".2f",
        row_unit="nats",
    ),
    Score(
        name="perplexity",
        title="test perplexity",
        base="untuned/test_perplexity",
        tuned="test/perplexity",
        form=".2f",
        unit="",
        higher_is_better=False,
        source="exp of the test loss",
        headline=True,
        column="loss",
        per="tokens",
        finish=perplexity,
        change=_exp_change,
    ),
    Score(
        name="bits_per_byte",
        title="bits per byte",
        base="untuned/bits_per_byte",
        tuned="test/bits_per_byte",
        form=".4f",
        unit="bits per UTF-8 byte",
        higher_is_better=False,
        source="loss of the response in bits over its UTF-8 bytes (Gao et al. 2020, The Pile)",
        column="loss",
        per="bytes",
        finish=lambda ratio: ratio / math.log(2),
        change=lambda old, gain: gain / math.log(2),
    ),
    Score(
        name="stopped",
        title="stop rate",
        base="untuned/stop_rate",
        tuned="sample/stop_rate",
        form=".1%",
        unit="share of completions",
        higher_is_better=True,
        source="end-of-text before max_new_tokens",
        test="mcnemar",
        ceiling="reference_stopped",
        span=1.0,
    ),
    Score(
        name="syntax",
        title="syntax rate",
        base="untuned/syntax_rate",
        tuned="sample/syntax_rate",
        form=".1%",
        unit="share of Python rows",
        higher_is_better=True,
        source="the completion is parsed as Python code; rows whose reference is Python",
        test="mcnemar",
        ceiling="reference_syntax",
        span=1.0,
    ),
    Score(
        name="chrf",
        title="chrF",
        base="untuned/chrf",
        tuned="sample/chrf",
        form=".2f",
        unit="of 100, mean over rows",
        higher_is_better=True,
        source="chrF2 of completion and reference (Popović 2015; sacrebleu's sentence level), mean over rows",
        span=100.0,
    ),
    Score(
        name="exact",
        title="exact match",
        base="untuned/exact_match",
        tuned="sample/exact_match",
        form=".1%",
        unit="share of completions",
        higher_is_better=True,
        source="equal to the reference, but for a Markdown fence, blank lines and white space at line ends",
        test="mcnemar",
        span=1.0,
    ),
    Score(
        name="repetition",
        title="repetition",
        base="untuned/repetition",
        tuned="sample/repetition",
        form=".1%",
        unit="share of 4-grams",
        higher_is_better=False,
        source="seq-rep-4, the share of 4-grams that occurred before (Welleck et al. 2020), mean over rows",
        span=1.0,
    ),
    Score(
        name="empty",
        title="empty rate",
        base="untuned/empty_rate",
        tuned="sample/empty_rate",
        form=".1%",
        unit="share of completions",
        higher_is_better=False,
        source="nothing but white space",
        test="mcnemar",
        span=1.0,
    ),
    Score(
        name="length",
        title="length",
        base="untuned/length",
        tuned="sample/length",
        form=".1f",
        unit="characters",
        higher_is_better=None,
        source="characters of a completion, mean over rows",
        row_form=",.0f",
        row_unit="characters",
    ),
    Score(
        name="passed",
        title="pass rate",
        base="untuned/pass_rate",
        tuned="sample/pass_rate",
        form=".1%",
        unit="share of rows with tests",
        higher_is_better=True,
        source="pass@1 of the greedy completion (Chen et al. 2021)",
        test="mcnemar",
        span=1.0,
    ),
)
# Scores of HumanEval's tasks, computed from records of their own (``model.evaluation.humaneval``).
HUMANEVAL = (
    Score(
        name="humaneval_pass_at_1",
        title="HumanEval pass@1",
        base="untuned/humaneval_pass_at_1",
        tuned="humaneval/pass_at_1",
        form=".2%",
        unit="mean over tasks",
        higher_is_better=True,
        source="HumanEval, share of the samples that pass (Chen et al. 2021)",
        column="pass_at_1",
        span=1.0,
    ),
    Score(
        name="humaneval_pass_at_k",
        title="HumanEval pass@k",
        base="untuned/humaneval_pass_at_k",
        tuned="humaneval/pass_at_k",
        form=".2%",
        unit="mean over tasks",
        higher_is_better=True,
        source="HumanEval, unbiased estimate of pass@k for humaneval_k (Chen et al. 2021)",
        column="pass_at_k",
        span=1.0,
    ),
)
ALL_SCORES = (VALIDATION_LOSS, *SCOREBOARD, *HUMANEVAL)
SCORE_OF_NAME = {score.name: score for score in ALL_SCORES}


def values(records: Sequence[Record], column: str) -> Array:
    """A column of records as (R,) float64; NaN where a row has no value (None, NaN, or no such column)."""
    return np.array([_number(record.get(column)) for record in records], dtype=np.float64)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def weights(records: Sequence[Record], score: Score) -> Array:
    """(R,) what a score divides by, row by row."""
    return np.ones(len(records)) if score.per is None else values(records, score.per)


def ratio(score: Score, column: Array, weight: Array) -> float:
    """The score of rows that all have a value: (R,) values, (R,) what they are divided by."""
    return score.finish(float(column.sum()) / float(weight.sum()))


def score_both(records: Sequence[Record], scoreboard: Sequence[Score] = SCOREBOARD) -> dict[str, float]:
    """The scores of both models, under MLflow's names; what cannot be computed is left out.

    Where the references have a value of their own it is there as ``untuned/reference_<name>``.
    """
    metrics: dict[str, float] = {}
    for score in scoreboard:
        weight = weights(records, score)
        columns = {score.base: f"base_{score.column}", score.tuned: score.column}
        if score.ceiling:
            columns[ceiling_name(score)] = score.ceiling
        for name, column in columns.items():
            found = values(records, column)
            present = ~np.isnan(found)
            if weight[present].sum() > 0:
                metrics[name] = ratio(score, found[present], weight[present])
    return metrics


def ceiling_name(score: Score) -> str:
    """MLflow's name for the references' value of a score."""
    return score.base.replace(UNTUNED, f"{UNTUNED}reference_", 1)


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The tuned model's values of the headline scores."""
    return {score.tuned: metrics[score.tuned] for score in ALL_SCORES if score.headline}


def describe_failures(failures: Mapping[str, int]) -> str:
    """Reasons of failure with their numbers, as a line."""
    return "; ".join(f"{count} x {reason or 'no reason'}" for reason, count in failures.items())


def score_sources(metrics: Mapping[str, float]) -> list[str]:
    """The definition or citation of each score that was computed, as the lines of a Markdown list."""
    return [f"- {score.title}: {score.source}" for score in ALL_SCORES if score.tuned in metrics]
