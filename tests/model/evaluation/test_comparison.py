"""Comparisons: intervals cover the truth, equal models are equal, different ones are told apart, rows are joined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from model.demo import EMBEDDED_BASE, grammar
from model.evaluation.comparison import Difference, compare, join, judge
from model.evaluation.completions import complete
from model.evaluation.config import SamplingConfig
from model.evaluation.records import Answers, References, build_records
from model.evaluation.scores import HUMANEVAL
from model.net.gpt import GPTModel
from model.net.tokenizer import load_tokenizer

Record = dict[str, Any]
TEXT = {"base_text": "a", "text": "b", "bytes": 10}


def _by_name(records: list[Record], seed: int = 0, resamples: int = 500) -> dict[str, Difference]:
    return {found.score: found for found in compare(records, seed, resamples)}


def _records(**columns: Any) -> list[Record]:
    """Records with these columns; a loss has its tokens."""
    rows = len(next(iter(columns.values())))
    filled = {"tokens": [1] * rows, "bytes": [1] * rows, **columns}
    return [
        {"key": str(row), "row": row, **{name: column[row] for name, column in filled.items()}} for row in range(rows)
    ]


# A population whose rows are as skewed as real ones: many short rows and a few long ones; most rows change little, a
# few change much; long rows are easier. Pairs of models are samples of it, so that the truth is known.


def _population(families: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    groups, rows = (families, 9) if families else (200_000, 1)
    shape = (groups, rows)
    tokens = np.maximum(2, np.exp(generator.normal(3.6, 0.7, shape))).astype(int)
    hardness = generator.gamma(4, 0.3, shape) * (1 + 10 / tokens)
    common = generator.gamma(1.5, 0.04, (groups, 1)) if families else 0.0  # what a family's rows share
    gain = common + generator.gamma(0.7, 0.06, shape) - 0.03 + generator.normal(0, 0.6, shape) / np.sqrt(tokens)
    old_pass = generator.random(shape) < 0.3
    flips = generator.random(shape)
    wins = generator.beta(0.8, 3.0, (groups, 1)) if families else 0.12
    new_pass = np.where(old_pass, flips > 0.05, flips < wins)
    return {
        "tokens": tokens, "base_loss": hardness * tokens, "loss": (hardness - gain) * tokens,
        "base_stopped": old_pass.astype(int), "stopped": new_pass.astype(int),
    }  # fmt: skip


def _coverage(pairs: int, families: int) -> dict[str, float]:
    """The share of simulated pairs whose interval holds the population's difference, for each score.

    Without families a pair has 500 rows; else 36 families of 9 rows, as the rows of ``make run``.
    """
    population = _population(5_000 if families else 0)
    total = {name: float(column.sum()) for name, column in population.items()}
    truth = {
        "loss": (total["loss"] - total["base_loss"]) / total["tokens"],
        "stopped": (total["stopped"] - total["base_stopped"]) / population["stopped"].size,
    }
    truth["perplexity"] = math.exp(total["loss"] / total["tokens"]) - math.exp(total["base_loss"] / total["tokens"])
    generator = np.random.default_rng(11)
    held = dict.fromkeys(truth, 0)
    for pair in range(pairs):
        chosen = generator.integers(0, len(population["tokens"]), families or 500)
        columns = {name: column[chosen].ravel() for name, column in population.items()}
        if families:
            columns["family"] = [f"family {number // 9}" for number in range(len(columns["tokens"]))]
        found = _by_name(_records(**columns), seed=pair)
        for name, value in truth.items():
            lower, upper = found[name].lower, found[name].upper
            assert lower is not None
            assert upper is not None
            held[name] += lower <= value <= upper
    return {name: count / pairs for name, count in held.items()}


@pytest.mark.parametrize("families", [0, 36])
def test_intervals_cover_the_truth(families: int) -> None:
    """In 100 pairs, within four deviations of 95 %; the next test has 1,000."""
    for name, share in _coverage(100, families).items():
        assert share == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 100) ** 0.5), name


@pytest.mark.slow
@pytest.mark.parametrize("families", [0, 36])
def test_intervals_cover_the_truth_in_93_to_97_percent(families: int) -> None:
    """Of 1,000 simulated pairs, for a ratio of tokens, its exponential, and a share; with and without families."""
    for name, share in _coverage(1000, families).items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_families_widen_the_interval() -> None:
    """Rows that only repeat their family say nothing new: as wide as for one row of each."""
    generator = np.random.default_rng(0)
    gains = generator.normal(0.05, 0.2, 20)
    once = _records(base_loss=np.full(20, 2.0), loss=2.0 - gains)
    repeated = _records(
        base_loss=np.full(200, 2.0), loss=np.repeat(2.0 - gains, 10), family=[str(i // 10) for i in range(200)]
    )
    apart = [{**record, "family": None} for record in repeated]
    want, found, naive = (_by_name(records)["loss"] for records in (once, repeated, apart))
    assert (found.families, naive.families, found.rows) == (20, 0, 200)
    assert (found.lower, found.upper) == pytest.approx((want.lower, want.upper))
    assert found.upper - found.lower > 2.5 * (naive.upper - naive.lower)  # type: ignore[operator]


def test_a_row_without_a_family_is_one_of_its_own() -> None:
    """Also where pandas has NaN for it; a single family cannot be drawn, so that its rows are."""
    columns = {"base_loss": np.arange(6.0), "loss": np.arange(6.0) ** 1.1}
    mixed = _by_name(_records(**columns, family=["a", "a", "b", None, math.nan, None]))["loss"]
    assert mixed.families == 5
    alone = _by_name(_records(**columns, family=["a"] * 6))["loss"]
    none = _by_name(_records(**columns))["loss"]
    assert (alone.families, alone.lower) == (0, none.lower)


def _same_twice(generator: np.random.Generator, rows: int = 200) -> list[Record]:
    """Two samplings of one model: every row has its own chances, and both draw from them."""
    columns: dict[str, Any] = {}
    chance, hardness = generator.beta(0.6, 0.6, rows), generator.gamma(2, 12, rows)
    for name in ("stopped", "syntax", "exact", "empty", "passed"):
        shown = chance if name in ("stopped", "syntax", "passed") else chance / 20
        for side in ("base_", ""):
            columns[side + name] = (generator.random(rows) < shown).astype(int)
    for name, scale in (("chrf", 0.5), ("length", 4.0), ("repetition", 0.01)):
        for side in ("base_", ""):
            columns[side + name] = hardness * scale * generator.gamma(3, 0.3, rows)
    columns["base_loss"] = columns["loss"] = hardness
    return _records(**columns)


def test_two_samplings_of_one_model_do_not_differ() -> None:
    """In at least 95 of 100 seeds no score of nine is called different: the correction holds for all together."""
    calm = 0
    for seed in range(100):
        found = compare(_same_twice(np.random.default_rng(seed)), seed, 500)
        assert len({each.entry.column for each in found}) == 9
        calm += all(each.verdict == "no difference" for each in found)
    assert calm >= 95


def test_equal_rows_are_exactly_no_difference() -> None:
    """A model against itself: nothing is rounded into a difference."""
    records = _same_twice(np.random.default_rng(0))
    same = [{**r, **{f"base_{name}": r[name] for name in r if f"base_{name}" in r}} for r in records]
    for family in (None, "two"):
        for found in compare([{**r, "family": family and f"{family}{r['row'] % 2}"} for r in same], 0):
            assert (found.difference, found.lower, found.upper, found.p) == (0.0, 0.0, 0.0, 1.0)
            assert found.verdict == "no difference"


def test_pass_fail_scores_have_mcnemars_p() -> None:
    """Five rows gained, none lost: 2 / 2**5, whatever the other rows do; the interval is the bootstrap's."""
    found = _by_name(_records(base_stopped=[0] * 5 + [1] * 20, stopped=[1] * 25))["stopped"]
    assert found.p == pytest.approx(2 / 2**5)
    assert found.difference == pytest.approx(0.2)
    assert found.lower is not None
    assert found.lower > 0
    assert found.verdict == "no difference", "the interval alone does not decide"


def test_with_families_the_larger_p_counts() -> None:
    """McNemar's test takes rows as independent: twelve rows of one family are one observation."""
    families = [f"{number}" for number in range(6) for _ in range(12)]
    columns = {"base_stopped": [0] * 72, "stopped": [1] * 12 + [0] * 60}
    apart = _by_name(_records(**columns))["stopped"]
    grouped = _by_name(_records(**columns, family=families))["stopped"]
    assert apart.verdict == "better"
    assert (grouped.verdict, grouped.p) == ("no difference", pytest.approx(0.36, abs=0.02))


@pytest.mark.parametrize(
    ("column", "up", "down"),
    [("chrf", "better", "worse"), ("loss", "worse", "better"), ("length", *["different"] * 2)],
)
def test_verdicts_know_the_direction(column: str, up: str, down: str) -> None:
    """A higher chrF is better, a higher loss worse, and a greater length is neither."""
    generator = np.random.default_rng(2)
    old = generator.gamma(3, 1, 100)
    for sign, verdict in ((1, up), (-1, down)):
        new = old + sign * generator.normal(0.5, 0.2, 100)
        found = _by_name(_records(**{f"base_{column}": old, column: new}))
        assert found[column].verdict == verdict
        assert found[column].corrected < 0.01  # type: ignore[operator]


def test_scores_of_one_column_are_one_hypothesis() -> None:
    """Loss, perplexity and bits per byte have one corrected p; with a second column it is doubled."""
    generator = np.random.default_rng(2)
    old = generator.gamma(3, 1, 60)
    columns = {"base_loss": old, "loss": old + generator.normal(0.05, 0.3, 60)}
    alone = _by_name(_records(**columns))
    assert {alone[name].corrected for name in ("loss", "perplexity", "bits_per_byte")} == {alone["loss"].p}
    both = _by_name(_records(**columns, base_chrf=old, chrf=old + generator.normal(0, 0.3, 60)))
    assert both["loss"].corrected == pytest.approx(min(1.0, 2 * alone["loss"].p))  # type: ignore[operator]


def test_two_comparisons_that_are_shown_together_are_corrected_together() -> None:
    """Twelve tasks gained of twelve: corrected for the scores of the rows too, and a verdict may fall with it."""
    tasks = _records(base_pass_at_1=[0.0] * 12, pass_at_1=[0.0] * 5 + [0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.3])
    alone = compare(tasks, 0, 500, HUMANEVAL)
    assert [each.verdict for each in alone] == ["better"]
    assert alone[0].corrected == alone[0].p
    rows = compare(_same_twice(np.random.default_rng(0)), 0, 500)
    judged = judge([*rows, *alone])
    assert judged[-1].corrected == pytest.approx(10 * alone[0].p)  # type: ignore[operator]
    assert judged[-1].verdict == "no difference"
    assert judge(alone) == alone


def test_rows_without_a_value_are_not_compared() -> None:
    """Neither None nor the NaN of a table is a value; a row has to have the score under both models."""
    found = _by_name(_records(base_chrf=[1.0, None, 3.0, 4.0], chrf=[2.0, 5.0, math.nan, 6.0]))
    assert set(found) == {"chrf"}
    assert (found["chrf"].rows, found["chrf"].old, found["chrf"].new) == (2, 2.5, 4.0)


def test_an_infinite_loss_is_not_compared() -> None:
    found = _by_name(_records(base_loss=[1.0, 2.0], loss=[1.0, math.inf], base_chrf=[1, 2], chrf=[2, 3]))
    assert set(found) == {"chrf"}


@pytest.mark.parametrize(("old", "new"), [(3.0, 9_000.0), (9_000.0, 3.0), (2_100.0, 9_000.0)])
def test_a_diverged_model_has_finite_differences(old: float, new: float) -> None:
    """Both perplexities are limited to e^700, and so is their difference; its square would overflow."""
    found = _by_name(_records(base_loss=[old, 1.0, 2.0], loss=[new, 1.5, 2.5], tokens=[2, 1, 1]))["perplexity"]
    assert found.difference == pytest.approx(found.new - found.old, rel=1e-9)
    assert found.lower is not None
    assert found.upper is not None
    assert math.isfinite(found.lower)
    assert math.isfinite(found.upper)


def test_one_row_has_no_interval() -> None:
    found = _by_name(_records(base_loss=[2.0], loss=[1.0]))["loss"]
    assert (found.difference, found.lower, found.upper, found.p) == (-1.0, None, None, None)
    assert found.verdict == "no difference"


def test_an_interval_ends_where_differences_do() -> None:
    """Of three rows it is wide; a share cannot rise by more than 100 %."""
    found = _by_name(_records(base_stopped=[0, 0, 1], stopped=[1, 1, 0], base_chrf=[0, 99, 0], chrf=[99, 0, 99]))
    assert (found["stopped"].lower, found["stopped"].upper) == (-1.0, 1.0)
    assert (found["chrf"].lower, found["chrf"].upper) == (-100.0, 100.0)


def test_it_is_a_function_of_its_seed() -> None:
    records = _same_twice(np.random.default_rng(3))
    assert compare(records, 1, 300) == compare(records, 1, 300)
    assert compare(records, 1, 300) != compare(records, 2, 300)


# Joining two runs


def _run(keys: str, loss: float, **changes: Any) -> list[Record]:
    """A run's records, one for each character, which is its key."""
    return [
        {"key": key, "row": row, "tokens": 4, "bytes": 9, "base_text": "untouched", "text": f"{key} {loss}",
         "base_loss": 9.0, "loss": loss, "reference_stopped": True, **changes}
        for row, key in enumerate(keys)
    ]  # fmt: skip


def test_runs_are_joined_by_content() -> None:
    """Whatever the order; ``base_`` is the first run, and rows of one run alone are left out."""
    joined = join(_run("abcx", 2.0), _run("yca", 1.0))
    assert [(r["key"], r["base_text"], r["text"]) for r in joined] == [
        ("c", "c 2.0", "c 1.0"),
        ("a", "a 2.0", "a 1.0"),
    ]
    assert [(r["base_loss"], r["loss"], r["row"]) for r in joined] == [(2.0, 1.0, 1), (2.0, 1.0, 2)]
    assert joined[0]["reference_stopped"] is True


def test_equal_rows_are_paired_in_order() -> None:
    """A test split may hold a row twice: no pair is made twice."""
    first = [{**record, "text": f"{number}"} for number, record in enumerate(_run("aab", 2.0))]
    joined = join(first, _run("aaa", 1.0))
    assert [r["base_text"] for r in joined] == ["0", "1"]


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 test rows of the first run is among the 3 of the second"):
        join(_run("ab", 2.0), _run("cde", 1.0))


def test_losses_stand_only_on_equal_tokens() -> None:
    """Cut at another length, a row has no loss; under another tokenizer none has, whatever rows agree by chance."""
    second = _run("abc", 1.0)
    second[1] |= {"tokens": 3, "bytes": 7}
    assert [r["loss"] for r in join(_run("abc", 2.0), second)] == [1.0, None, 1.0]
    second[1] |= {"tokens": 3, "bytes": 9}
    joined = join(_run("abc", 2.0), second)
    assert [(r["base_loss"], r["loss"]) for r in joined] == [(None, None)] * 3
    assert joined[0]["text"] == "a 1.0"


# With a real model


@pytest.fixture(scope="module")
def rows() -> list[Record]:
    """Prompts and references of the embedded data."""
    return [{"row": row, **record} for row, record in enumerate(grammar.make_rows()[1][:60])]


@pytest.fixture(scope="module")
def sampled(rows: list[Record]) -> Callable[..., Answers]:
    """sampled(seed, noise): what the embedded base writes, with noise added to its final norm."""
    tokenizer = load_tokenizer(EMBEDDED_BASE, GPTModel.from_pretrained(EMBEDDED_BASE).config.vocab_size)

    def sample(seed: int, noise: float = 0.0) -> Answers:
        model = GPTModel.from_pretrained(EMBEDDED_BASE)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            model.ln_f.weight += noise * torch.randn(model.ln_f.weight.shape, generator=generator)
        config = SamplingConfig(max_new_tokens=20, seed=seed)
        found = complete(model, tokenizer, [row["prompt"] for row in rows], config)
        return Answers(np.ones(len(rows)), found, [None] * len(rows), [None] * len(rows))

    return sample


def _compared(rows: list[Record], first: Answers, second: Answers) -> list[Difference]:
    texts = [row["completion"] for row in rows]
    alone = [{name: value for name, value in row.items() if name != "family"} for row in rows]
    references = References(alone, np.ones(len(rows)), texts, texts, [True] * len(rows))
    return compare(build_records(references, first, second), 0, 2000)


def test_a_damaged_checkpoint_is_told_apart(rows: list[Record], sampled: Callable[..., Answers]) -> None:
    """Two checkpoints that differ on purpose: p below 0.01, corrected, by what they write alone."""
    found = {each.score: each for each in _compared(rows, sampled(0), sampled(0, noise=1.5))}
    assert found["chrf"].verdict == "worse"
    assert found["chrf"].corrected < 0.01  # type: ignore[operator]


@pytest.mark.slow
def test_a_model_against_itself_does_not_differ(rows: list[Record], sampled: Callable[..., Answers]) -> None:
    """The embedded base, sampled with 200 seeds: in at least 95 of 100 pairs no score differs.

    No sampling is in two pairs: an unusual one would count twice.
    """
    answers = [sampled(seed) for seed in range(200)]
    assert len({completion.text for found in answers for completion in found.completions if completion}) > 1000
    calm = sum(
        all(each.verdict == "no difference" for each in _compared(rows, first, second))
        for first, second in zip(answers[::2], answers[1::2], strict=True)
    )
    assert calm >= 95
