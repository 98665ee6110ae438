"""Scores, samples and pass rates of base and tuned model, as lines and records for tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from model.evaluation.comparison import Difference
from model.evaluation.scores import ALL_SCORES, Record, Score, ceiling_name

_SAMPLES = 16  # rows of the table of samples
_LONGEST = 1e12  # numbers from there on have an exponent
_COMMONEST = 3  # reasons of failure
_PLACE = re.compile(r" \((?:detected at|<unknown>,) line \d+\)")  # in messages of SyntaxError


class Line(NamedTuple):
    """A line of the table of scores, as text.

    Attributes:
        difference: tuned - base, with its sign; empty where there is none.
        interval: its 95 % interval; empty where there is none.
        verdict: better, worse, different or no difference; empty where nothing was compared.
        better: the direction: higher, lower, or empty.
        reference: the references' own value; empty where there is none.
    """

    title: str
    base: str
    tuned: str
    difference: str
    interval: str
    verdict: str
    unit: str
    better: str
    reference: str


def score_table(metrics: Mapping[str, float], differences: Sequence[Difference] = ()) -> list[Line]:
    """A line for each score that was computed, in the order of the scoreboard."""
    found = {each.score: each for each in differences}
    return [
        _line(score, metrics, found.get(score.name))
        for score in ALL_SCORES
        if score.base in metrics and score.tuned in metrics
    ]


def _line(score: Score, metrics: Mapping[str, float], difference: Difference | None) -> Line:
    change = interval = verdict = reference = ""
    if difference:
        change, verdict = signed(difference.difference, score.form), difference.verdict
        interval = interval_text(difference)
    if score.ceiling and ceiling_name(score) in metrics:
        reference = formatted(metrics[ceiling_name(score)], score.form)
    base, tuned = (formatted(metrics[name], score.form) for name in (score.base, score.tuned))
    return Line(score.title, base, tuned, change, interval, verdict, score.unit, better(score), reference)


def interval_text(difference: Difference) -> str:
    """The 95 % interval of a difference; empty where there is none."""
    if difference.lower is None or difference.upper is None:
        return ""
    form = difference.entry.form
    return f"{signed(difference.lower, form)} to {signed(difference.upper, form)}"


def better(score: Score) -> str:
    """Which values of a score are better: higher, lower, or empty where neither is."""
    if score.higher_is_better is None:
        return ""
    return "higher" if score.higher_is_better else "lower"


def formatted(value: float, form: str) -> str:
    """A value in the form of its score; the perplexity of a diverged model would fill a page with its 300 digits."""
    return format(value, _form(value, form))


def _form(value: float, form: str) -> str:
    return form if abs(value) < _LONGEST else ".4g"


def signed(value: float, form: str) -> str:
    """A difference as ``formatted``, with its sign; 0 has none."""
    text = format(value, f"+{_form(value, form)}")
    return text[1:] if float(text.strip("%")) == 0 else text


def row_value(score: Score, value: float) -> str:
    """A score of a single row: yes or no, or a number with its unit."""
    if score.test == "mcnemar":
        return "yes" if value else "no"
    return f"{formatted(value, score.row_form or score.form)} {score.row_unit}".strip()


def score_table_markdown(metrics: Mapping[str, float], differences: Sequence[Difference] = ()) -> list[str]:
    """``score_table`` as the lines of a Markdown table."""
    lines = ["| | base | tuned | difference | 95 % interval | | unit | better |", "|---|---|---|---|---|---|---|---|"]
    for line in score_table(metrics, differences):
        title = f"{line.title} (references: {line.reference})" if line.reference else line.title
        cells = title, line.base, line.tuned, line.difference, line.interval, line.verdict, line.unit, line.better
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sample_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The first completed rows: prompt, reference, both completions, and which of them stopped by itself."""
    completed = [record for record in records if record["text"] is not None and record["stopped"] is not None]
    return [
        {
            "row": record["row"],
            "prompt": record["prompt"],
            "reference": record["reference"],
            "base": record["base_text"],
            "base_stopped": record["base_stopped"],
            "tuned": record["text"],
            "tuned_stopped": record["stopped"],
        }
        for record in completed[:_SAMPLES]
    ]


def pass_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One record per task family: rows whose tests were run for both models, and the share that each one passes."""
    families: dict[str, list[tuple[bool, bool]]] = {}
    for record in records:
        if record["passed"] is not None and record["base_passed"] is not None:
            families.setdefault(record["family"] or "", []).append((record["base_passed"], record["passed"]))
    return [
        {
            "family": family,
            "rows": len(passes),
            "base": sum(before for before, _ in passes) / len(passes),
            "tuned": sum(after for _, after in passes) / len(passes),
        }
        for family, passes in sorted(families.items())
    ]


def common_failures(records: Sequence[Record]) -> dict[str, int]:
    """The commonest kinds of reasons why the tuned model's completions failed their tests, with their numbers."""
    failed = (failure_kind(r["failure"]) for r in records if r["passed"] is False)
    return dict(Counter(failed).most_common(_COMMONEST))


def failure_kind(reason: str | None) -> str:
    """A reason without what differs from row to row: the assertion that failed, and numbers of lines."""
    if not reason:
        return "no reason"
    return "an assertion failed" if reason.startswith("assert ") else _PLACE.sub("", reason)
