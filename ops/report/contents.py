"""What a page shows: score lines, the rows that changed most, and pictures, as plain values for its template."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from model.evaluation.comparison import Difference
from model.evaluation.scores import ALL_SCORES, SCOREBOARD, Record, Score, ceiling_name, values
from model.evaluation.tables import better, failure_kind, formatted, interval_text, row_value, signed
from ops.report.differences import plain, shortened, side_by_side
from ops.report.pictures import histogram, sorted_gains

SCORE_NOTES = (
    "Intervals are for one score at a time. A score is called better or worse if its p, corrected for the number of "
    "scores (Holm), is below 0.05. Differences of shares are in percentage points."
)
EXTREMES = 5  # best rows, and worst rows
_REASONS, _REASON_CHARACTERS = 6, 200  # of failure
# Characters of a row's texts on a page. Ten rows of signs that HTML must escape are then below 300 KB.
_NAME_CHARACTERS = 100
_PROMPT_CHARACTERS = 600
_REFERENCE_CHARACTERS = 800
_COMPLETION_CHARACTERS = 1_000


@dataclass(frozen=True)
class ScoreLine:
    """A score of two models, formatted.

    Attributes:
        ceiling: the references' own value; empty where it is not known.
        interval: of the difference; empty where there is none.
        verdict: "better", "worse", "different", "no difference", or empty where the rows were not compared.
    """

    title: str
    unit: str
    direction: str
    old: str
    new: str
    ceiling: str
    difference: str
    interval: str
    p: str
    rows: str
    verdict: str


def score_lines(differences: Sequence[Difference], metrics: Mapping[str, float] | None = None) -> list[ScoreLine]:
    """A line for each score that two models have on common rows.

    Args:
        metrics: of the run, for the references' own values; None leaves them out.
    """
    found = {each.score: each for each in differences}
    ceilings = {
        score.name: metrics[ceiling_name(score)]
        for score in ALL_SCORES
        if metrics and score.ceiling and ceiling_name(score) in metrics
    }
    return [_line(score, found[score.name], ceilings.get(score.name)) for score in ALL_SCORES if score.name in found]


def _line(score: Score, found: Difference, ceiling: float | None) -> ScoreLine:
    return ScoreLine(
        title=score.title,
        unit=score.unit,
        direction=direction(score),
        old=formatted(found.old, score.form),
        new=formatted(found.new, score.form),
        ceiling="" if ceiling is None else formatted(ceiling, score.form),
        difference=signed(found.difference, score.form),
        interval=interval_text(found),
        p=_p(found.corrected),
        rows=f"{found.rows:,}",
        verdict=found.verdict,
    )


def direction(score: Score) -> str:
    """Which values of a score are better, in words; empty where neither is."""
    found = better(score)
    return f"{found} is better" if found else ""


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def summary(lines: Sequence[ScoreLine], old: str, new: str, records: Sequence[Record] = ()) -> str:
    """The result in a sentence: the test loss, and which other scores are better or worse beyond chance.

    Args:
        lines: as ``score_lines`` gives them.
        old, new: what the two models are called.
        records: of their rows; where a loss is not finite, the result is that a model is broken.
    """
    if said := broken(records, old, new):
        found = {
            verdict: [line.title for line in lines if line.verdict == verdict] for verdict in ("better", "worse")
        }
        others = [f"{verdict}: {', '.join(titles)}" for verdict, titles in found.items() if titles]
        return f"{'; '.join([_capitalised(said), *others])}."
    if not lines:
        return _capitalised(f"{new} and {old} have no score in common.")
    first, *rest = lines
    sentence = f"{_judged(first, old, new)}: {first.title} {first.old} → {first.new}"
    if first.interval:
        sentence += f" ({first.difference}, 95 % interval {first.interval})"
    for verdict in ("better", "worse"):
        titles = [line.title for line in rest if line.verdict == verdict]
        if titles:
            too = " too" if first.verdict == verdict else ""
            sentence += f"; {verdict}{too}: {', '.join(titles)}"
    return _capitalised(sentence + ".")


def broken(records: Sequence[Record], old: str, new: str) -> str:
    """Which of two models has a loss that is infinite or NaN, and on how many rows; empty if none has."""
    said = []
    for name, column in ((old, "base_loss"), (new, "loss")):
        if count := sum(math.isinf(value) for value in values(records, column)):
            said.append(f"{name} is broken, its loss is infinite on {count:,} of {len(records):,} rows")
    return f"{' and '.join(said)}: losses are not compared" if said else ""


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _judged(line: ScoreLine, old: str, new: str) -> str:
    if line.verdict in ("better", "worse"):
        return f"{new} is {line.verdict} than {old}"
    return f"no difference between {new} and {old} is shown"


@dataclass(frozen=True)
class RowCard:
    """A row of the test split, with both completions side by side.

    Attributes:
        gain: of the summed loss in nats, with its sign.
        facts: the scores that differ, with their values under both models, as text.
        old, new: the completions, marked where they differ.
    """

    row: str
    key: str
    family: str
    gain: str
    facts: list[tuple[str, str, str]]
    prompt: Markup
    reference: Markup
    old: Markup
    new: Markup


def gain_of(record: Record) -> float:
    """By how much the row's summed loss fell, in nats; NaN where a model has none."""
    old, new = record.get("base_loss"), record.get("loss")
    return math.nan if old is None or new is None else float(old) - float(new)


def extreme_rows(records: Sequence[Record]) -> tuple[list[RowCard], list[RowCard]]:
    """The rows whose summed loss fell most, and those where it rose most or fell least. No row is in both."""
    order = sorted((r for r in records if math.isfinite(gain_of(r))), key=gain_of, reverse=True)
    count = min(EXTREMES, len(order) // 2)
    return [_card(r) for r in order[:count]], [_card(r) for r in reversed(order[len(order) - count :])]


def _card(record: Record) -> RowCard:
    old_text, new_text = record.get("base_text"), record.get("text")
    if old_text is None or new_text is None:
        old, new = (_completion(text) for text in (old_text, new_text))
    else:
        old, new = side_by_side(str(old_text), str(new_text), _COMPLETION_CHARACTERS)
    return RowCard(
        row=str(record.get("row")),
        key=shortened(str(record.get("key")), _NAME_CHARACTERS),
        family=shortened(str(record.get("family") or ""), _NAME_CHARACTERS),
        gain=f"{gain_of(record):+.2f}",
        facts=_facts(record),
        prompt=plain(str(record["prompt"]), _PROMPT_CHARACTERS),
        reference=plain(str(record["reference"]), _REFERENCE_CHARACTERS),
        old=old,
        new=new,
    )


def _facts(record: Record) -> list[tuple[str, str, str]]:
    """The scores of a row that differ: what is scored, its value under the old and the new model."""
    found = []
    for score in SCOREBOARD:
        old, new = record.get(f"base_{score.name}"), record.get(score.name)
        if old is None or new is None:
            continue
        before, after = (row_value(score, float(value)) for value in (old, new))
        if before != after:
            found.append((score.row_title, before, after))
    return found


def _completion(text: Any) -> Markup:
    if text is None:
        return Markup('<span class="remark">not completed</span>')
    return plain(str(text), _COMPLETION_CHARACTERS)


@dataclass(frozen=True)
class Captioned:
    """A picture, and what it shows in words."""

    picture: Markup
    sentence: str


def gains(records: Sequence[Record], old: str, new: str) -> Captioned | None:
    """The gain of each row in nats per token, the largest first; None without losses."""
    found = [gain_of(r) / r["tokens"] for r in records if math.isfinite(gain_of(r)) and r.get("tokens")]
    better, worse = (sum(sign * gain > 0 for gain in found) for sign in (1, -1))
    sentence = (
        f"Of {len(found):,} rows, {better:,} have a lower loss under {new} than under {old}, and {worse:,} a higher "
        "one."
    )
    picture = sorted_gains(found, "rows, the largest gain first", "gain, nats per token", sentence)
    return Captioned(picture, sentence) if picture else None


def lengths(records: Sequence[Record]) -> Captioned | None:
    """Response tokens of the test rows; None without records."""
    tokens = [int(record["tokens"]) for record in records if record.get("tokens")]
    if not tokens:
        return None
    middle, high = np.quantile(tokens, [0.5, 0.9]).tolist()
    sentence = (
        f"A response of the {len(tokens):,} scored test rows has {middle:,.0f} tokens at the median, {high:,.0f} at "
        f"the 90th percentile and {max(tokens):,} at most."
    )
    picture = histogram([float(count) for count in tokens], "response tokens", "test rows", sentence)
    return Captioned(picture, sentence) if picture else None


def failures(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """The commonest kinds of reasons why completions did not pass their tests: its number under each model."""

    def count(prefix: str) -> Counter[str]:
        failed = (record for record in records if record.get(f"{prefix}passed") is False)
        return Counter(failure_kind(record.get(f"{prefix}failure")) for record in failed)

    old, new = count("base_"), count("")
    return [
        (shortened(reason, _REASON_CHARACTERS), f"{old[reason]:,}", f"{new[reason]:,}")
        for reason, _ in (old + new).most_common(_REASONS)
    ]
