"""Is one model better than another? Records of two models joined by row, and the differences of their scores.

The tuned model against its base, one run against another, and one night against the next are the same comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from model.evaluation.bootstrap import Spread, holm, mcnemar_p, resampled_sums
from model.evaluation.scores import SCORE_OF_NAME, SCOREBOARD, Array, Record, Score, ratio, values, weights

Verdict = Literal["better", "worse", "different", "no difference"]
RESAMPLES = 10_000
LEVEL = 0.05  # of the corrected p values


@dataclass(frozen=True)
class Difference:
    """By how much a score changed from the old model (the base, or the first run) to the new one.

    Attributes:
        score: name of the entry of the scoreboard.
        old: value of the old model on the compared rows.
        new: value of the new model on the same rows.
        difference: new - old.
        lower: lower end of its two-sided 95 % interval, not corrected for the number of scores; None for one row.
        upper: upper end.
        p: two-sided, of "no difference", not corrected: McNemar's exact one for pass/fail scores (with families the
            bootstrap's, if that is larger), else the bootstrap's; None for one row.
        rows: compared.
        verdict: "no difference" unless the corrected p is below 0.05 and the interval excludes 0; else "better" or
            "worse", or "different" for a score that has no better direction.
        corrected: p after Holm's correction for the number of scores compared; None like p.
        families: families of rows that were drawn for the interval; 0 where rows were drawn.
    """

    score: str
    old: float
    new: float
    difference: float
    lower: float | None
    upper: float | None
    p: float | None
    rows: int
    verdict: Verdict
    corrected: float | None = None
    families: int = 0

    @property
    def entry(self) -> Score:
        """The score's entry of the scoreboard."""
        return SCORE_OF_NAME[self.score]


def join(first: Sequence[Record], second: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows that two runs have in common, in the order of the second: ``base_*`` are the first run's tuned values.

    A row is found by its content (``key``); of rows with equal content the first is paired with the first, and so on.
    Rows of one run alone are left out. A loss stands only where both runs scored the same tokens: where the bytes of
    a row differ (another ``max_length``) the row has none, and where tokens differ over the same bytes (another
    tokenizer) no row has one.

    Raises:
        ValueError: they have no row in common.
    """
    old = {occurrence: record for occurrence, record in zip(_occurrences(first), first, strict=True)}
    pairs = [
        (old[occurrence], record)
        for occurrence, record in zip(_occurrences(second), second, strict=True)
        if occurrence in old
    ]
    if not pairs:
        raise ValueError(
            f"none of the {len(first)} test rows of the first run is among the {len(second)} of the second: they "
            "were scored on other data, or on other splits of it"
        )
    retokenised = any(a["bytes"] == b["bytes"] and a["tokens"] != b["tokens"] for a, b in pairs)
    return [_joined(a, b, not retokenised and a["bytes"] == b["bytes"]) for a, b in pairs]


def _occurrences(records: Sequence[Record]) -> list[tuple[str, int]]:
    """For each record its key, and how many records before it have the same."""
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        found.append((record["key"], seen[record["key"]]))
        seen[record["key"]] += 1
    return found


def _joined(old: Record, new: Record, same_tokens: bool) -> dict[str, Any]:
    """The new run's record with the old run's tuned values in place of the base's."""
    record = {**new, **{name: old.get(name.removeprefix("base_")) for name in new if name.startswith("base_")}}
    return record if same_tokens else {**record, "base_loss": None, "loss": None}


@dataclass(frozen=True)
class _Pairs:
    """The rows on which both models have a score.

    Attributes:
        old, new: (R,) values.
        weight: (R,) what the sums are divided by.
        present: (all rows,) which rows these are.
    """

    score: Score
    old: Array
    new: Array
    weight: Array
    present: Array


def compare(
    records: Sequence[Record], seed: int, resamples: int = RESAMPLES, scoreboard: Sequence[Score] = SCOREBOARD
) -> list[Difference]:
    """The difference of each score between ``base_*`` and the plain columns; scores of no row are left out.

    Intervals come from the bootstrap. Rows are drawn with replacement, numerator and denominator of both models
    together. Where rows have a ``family``, families are drawn with all of their rows (Davison & Hinkley 1997, section
    3.8; Cameron, Gelbach & Miller 2008), because rows of a family resemble one another; a row without one is a family
    of its own. A single family cannot be drawn: its rows are. A score with an infinite value is left out.

    Args:
        records: of one run, or as ``join`` gives them.
        seed: of the draws.
        resamples: how often rows or families are drawn.
        scoreboard: the scores to compare; p values are corrected for their number. For the results of two calls that
            are shown together, see ``judge``.
    """
    compared = [pairs for score in scoreboard if (pairs := _pairs(score, records))]
    families = _families(records)
    spreads: dict[str, Spread] = {}
    same_rows: dict[bytes, list[_Pairs]] = {}  # drawn once
    for pairs in compared:
        same_rows.setdefault(pairs.present.tobytes(), []).append(pairs)
    for group in same_rows.values():
        spreads |= _spreads(group, families, seed, resamples)
    return judge([_difference(pairs, spreads[pairs.score.name]) for pairs in compared])


def judge(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with p values corrected for the number of all of them, and the verdicts that follow.

    So differences of two comparisons that are shown together, those of test rows and of HumanEval's tasks, name a
    score of two equal models in at most 5 % of cases together. Scores of one column (loss, perplexity, bits per byte)
    are one hypothesis, that of the first.
    """
    columns: dict[str, float] = {}
    for found in differences:
        if found.p is not None:
            columns.setdefault(found.entry.column, found.p)
    corrected = dict(zip(columns, holm(list(columns.values())), strict=True))
    return [_judged(found, corrected.get(found.entry.column)) for found in differences]


def _judged(found: Difference, corrected: float | None) -> Difference:
    verdict: Verdict = "no difference"
    excluded = found.lower is not None and found.upper is not None and not found.lower <= 0 <= found.upper
    if corrected is not None and corrected < LEVEL and excluded:
        verdict = "different"
        if found.entry.higher_is_better is not None:
            verdict = "better" if (found.difference > 0) == found.entry.higher_is_better else "worse"
    return replace(found, corrected=corrected, verdict=verdict)


def _families(records: Sequence[Record]) -> Array | None:
    """(R,) number of each row's family, and a number of its own where it has none; None if no row has one."""
    names = [record.get("family") for record in records]  # None, or NaN in a table of pandas, where a row has none
    if not any(isinstance(name, str) for name in names):
        return None
    numbers: dict[str | int, int] = {}
    keys = (name if isinstance(name, str) else index for index, name in enumerate(names))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _pairs(score: Score, records: Sequence[Record]) -> _Pairs | None:
    """The rows that have the score under both models; None if there is none, or if a value is infinite."""
    old, new, weight = values(records, f"base_{score.column}"), values(records, score.column), weights(records, score)
    present = ~(np.isnan(old) | np.isnan(new) | np.isnan(weight))
    if not weight[present].sum() > 0 or np.isinf(old[present]).any() or np.isinf(new[present]).any():
        return None
    return _Pairs(score, old[present], new[present], weight[present], present)


def _spreads(group: Sequence[_Pairs], families: Array | None, seed: int, resamples: int) -> dict[str, Spread]:
    """How far the differences of scores that have the same rows vary when rows or families are drawn again."""
    columns = np.stack([column for p in group for column in (p.old, p.new - p.old, p.weight)], axis=1)
    drawn = 0
    if families is not None:
        found, owner = np.unique(families[group[0].present], return_inverse=True)
        if len(found) > 1:
            drawn = len(found)
            sums = np.zeros((drawn, columns.shape[1]))
            np.add.at(sums, owner, columns)
            columns = sums
    resampled = resampled_sums(columns, seed, resamples)
    spreads = {}
    for index, pairs in enumerate(group):
        old, gain, weight = resampled[:, 3 * index : 3 * index + 3].T
        some = weight > 0
        changes = pairs.score.change(old[some] / weight[some], gain[some] / weight[some])
        spreads[pairs.score.name] = Spread.of(changes, len(columns), drawn)
    return spreads


def _p(pairs: _Pairs, spread: Spread) -> float | None:
    """McNemar's for pass/fail scores. It takes rows as independent, so that with families the larger p counts."""
    p = spread.p(_change(pairs))
    if pairs.score.test == "bootstrap":
        return p
    exact = mcnemar_p(pairs.old, pairs.new)
    return max(exact, p) if spread.families and p is not None else exact


def _change(pairs: _Pairs) -> float:
    """new - old; exactly 0 where all rows are equal."""
    total = pairs.weight.sum()
    old, gain = pairs.old.sum() / total, (pairs.new - pairs.old).sum() / total
    return float(pairs.score.change(np.array(old), np.array(gain)))


def _difference(pairs: _Pairs, spread: Spread) -> Difference:
    """A difference that is not yet judged."""
    score, difference = pairs.score, _change(pairs)
    interval = spread.interval(difference)
    return Difference(
        score=score.name,
        old=ratio(score, pairs.old, pairs.weight),
        new=ratio(score, pairs.new, pairs.weight),
        difference=difference,
        lower=max(interval[0], -score.span) if interval else None,
        upper=min(interval[1], score.span) if interval else None,
        p=_p(pairs, spread),
        rows=len(pairs.old),
        verdict="no difference",
        families=spread.families,
    )
