"""The scoreboard: every score of a model, in one list that all tables, cards and MLflow's names are made from.

To add a score, write its function and add its entry to SCOREBOARD. docs/architecture.md names the tests and pages
that list scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model.engine.scoring import mean_loss, perplexity
from model.evaluation.completions import Completion

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outputs:
    """What one model gave on the held-out rows: all that scores are computed from.

    Attributes:
        validation_loss: nats per response token on the validation split.
        row_losses: (R,) nats, summed over the response of each row of the test split.
        row_tokens: (R,) response tokens of these rows.
        sampled_rows: the first ``sample_rows`` rows of the test split; ``row["completion"]`` is the reference.
        sampled_completions: the model's completions of these rows, in the same order.
        passes: for each of the first ``pass_rows`` rows with tests, whether its greedy completion passed them.
        not_executed: number of greedy completions that could not be executed, and so did not pass.
        failures: the commonest reasons why greedy completions did not pass, with their numbers.
    """

    validation_loss: float
    row_losses: Array
    row_tokens: Array
    sampled_rows: Sequence[Mapping[str, Any]] = ()
    sampled_completions: Sequence[Completion] = ()
    passes: Sequence[bool] = ()
    not_executed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """An entry of the scoreboard.

    Attributes:
        title: for tables.
        base: MLflow's name for the untouched base's value.
        tuned: MLflow's name for the tuned model's value.
        compute: from a model's outputs to the value; None where there is nothing to compute it from.
        form: format specification of the value in tables.
        unit: of the value; empty for a plain number.
        higher_is_better: the direction, shown in Markdown tables.
        source: definition or citation, shown in the model card.
        headline: a score that decides between versions: ``publish`` logs it with the model, and the description of
            the registered version shows it.
    """

    title: str
    base: str
    tuned: str
    compute: Callable[[Outputs], float | None]
    form: str
    unit: str
    higher_is_better: bool
    source: str
    headline: bool = False


def validation_loss(outputs: Outputs) -> float:
    """Nats per response token on the validation split."""
    return outputs.validation_loss


def response_loss(outputs: Outputs) -> float:
    """Nats per response token on the test split."""
    return mean_loss(outputs.row_losses, outputs.row_tokens)


def response_perplexity(outputs: Outputs) -> float:
    """exp of the test loss."""
    return perplexity(response_loss(outputs))


def stop_rate(outputs: Outputs) -> float | None:
    """Share of the sampled completions that ended by themselves."""
    return _share([completion.stopped for completion in outputs.sampled_completions])


def pass_rate(outputs: Outputs) -> float | None:
    """Share of the rows with tests whose greedy completion passes them."""
    return _share(outputs.passes)


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


SCOREBOARD = (
    Score(
        title="validation loss",
        base="base/eval_loss",
        tuned="best/eval_loss",
        compute=validation_loss,
        form=".4f",
        unit="nats per token",
        higher_is_better=False,
        source="cross-entropy on response tokens; it selects the checkpoint",
        headline=True,
    ),
    Score(
        title="test loss",
        base="base/test_loss",
        tuned="test/loss",
        compute=response_loss,
        form=".4f",
        unit="nats per token",
        higher_is_better=False,
        source="cross-entropy on response tokens",
        headline=True,
    ),
    Score(
        title="test perplexity",
        base="base/test_perplexity",
        tuned="test/perplexity",
        compute=response_perplexity,
        form=".2f",
        unit="",
        higher_is_better=False,
        source="exp of the test loss",
        headline=True,
    ),
    Score(
        title="stop rate",
        base="base/stop_rate",
        tuned="sample/stop_rate",
        compute=stop_rate,
        form=".1%",
        unit="share of completions",
        higher_is_better=True,
        source="end-of-text before max_new_tokens",
    ),
    Score(
        title="pass rate",
        base="base/pass_rate",
        tuned="sample/pass_rate",
        compute=pass_rate,
        form=".1%",
        unit="share of rows with tests",
        higher_is_better=True,
        source="pass@1 of the greedy completion (Chen et al. 2021)",
    ),
)


def score_both(base: Outputs, tuned: Outputs) -> dict[str, float]:
    """The scoreboard of both models, under MLflow's names; what cannot be computed is left out."""
    metrics: dict[str, float] = {}
    for score in SCOREBOARD:
        for name, outputs in ((score.base, base), (score.tuned, tuned)):
            value = score.compute(outputs)
            if value is not None:
                metrics[name] = value
    return metrics


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The tuned model's values of the headline scores."""
    return {score.tuned: metrics[score.tuned] for score in SCOREBOARD if score.headline}


def score_table(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """A line for each score that was computed: title, the base's value, the tuned model's value, unit."""
    return [
        (score.title, format(metrics[score.base], score.form), format(metrics[score.tuned], score.form), score.unit)
        for score in SCOREBOARD
        if score.base in metrics and score.tuned in metrics
    ]


def score_table_markdown(metrics: Mapping[str, float]) -> list[str]:
    """``score_table`` as the lines of a Markdown table, with the direction in which a score is better."""
    better = {score.title: "higher" if score.higher_is_better else "lower" for score in SCOREBOARD}
    lines = ["| | base | tuned | unit | better |", "|---|---|---|---|---|"]
    return lines + [f"| {' | '.join(cells)} | {better[cells[0]]} |" for cells in score_table(metrics)]


def describe_failures(failures: Mapping[str, int]) -> str:
    """Reasons of failure with their numbers, as a line."""
    return "; ".join(f"{count} x {reason or 'no reason'}" for reason, count in failures.items())


def score_sources(metrics: Mapping[str, float]) -> list[str]:
    """The definition or citation of each score that was computed, as the lines of a Markdown list."""
    return [f"- {score.title}: {score.source}" for score in SCOREBOARD if score.tuned in metrics]
