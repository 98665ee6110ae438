"""The scoreboard: each score is computed from a model's outputs, and all names and tables come from its entries."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from model.evaluation.completions import Completion
from model.evaluation.scores import SCOREBOARD, Outputs, headline, score_both, score_table, score_table_markdown

README = Path(__file__).resolve().parents[3] / "README.md"
BASE = Outputs(
    validation_loss=3.0,
    row_losses=np.array([10.0, 20.0]),
    row_tokens=np.array([4, 6]),
    sampled_rows=[{"prompt": "p", "completion": "c"}] * 2,
    sampled_completions=[Completion("x", False), Completion("y", False)],
    passes=[False, False, False, False],
    not_executed=1,
)
TUNED = Outputs(
    validation_loss=1.5,
    row_losses=np.array([5.0, 2.0]),
    row_tokens=np.array([4, 6]),
    sampled_rows=[{"prompt": "p", "completion": "c"}] * 2,
    sampled_completions=[Completion("c", True), Completion("y", False)],
    passes=[True, True, True, False],
)


def test_scores_of_both_models() -> None:
    """The values under MLflow's names; losses are averaged over tokens, not over rows."""
    assert score_both(BASE, TUNED) == {
        "base/eval_loss": 3.0,
        "best/eval_loss": 1.5,
        "base/test_loss": 3.0,
        "test/loss": 0.7,
        "base/test_perplexity": pytest.approx(math.exp(3.0)),
        "test/perplexity": pytest.approx(math.exp(0.7)),
        "base/stop_rate": 0.0,
        "sample/stop_rate": 0.5,
        "base/pass_rate": 0.0,
        "sample/pass_rate": 0.75,
    }


def test_what_cannot_be_computed_is_left_out() -> None:
    """Without sampled rows and without tests there is no stop rate and no pass rate, in no table."""
    bare = Outputs(3.0, np.array([1.0]), np.array([1]))
    metrics = score_both(bare, bare)
    assert not {"sample/stop_rate", "sample/pass_rate", "base/stop_rate", "base/pass_rate"} & metrics.keys()
    assert [title for title, *_ in score_table(metrics)] == ["validation loss", "test loss", "test perplexity"]


def test_tables_come_from_the_scoreboard() -> None:
    """One line for each entry, in its order and form."""
    metrics = score_both(BASE, TUNED)
    table = score_table(metrics)
    assert [title for title, *_ in table] == [score.title for score in SCOREBOARD]
    assert table[0] == ("validation loss", "3.0000", "1.5000", "nats per token")
    assert table[-1] == ("pass rate", "0.0%", "75.0%", "share of rows with tests")
    assert score_table_markdown(metrics)[2] == "| validation loss | 3.0000 | 1.5000 | nats per token | lower |"
    assert headline(metrics) == {
        "best/eval_loss": 1.5,
        "test/loss": 0.7,
        "test/perplexity": metrics["test/perplexity"],
    }


@pytest.mark.parametrize("score", SCOREBOARD, ids=lambda score: score.title)
def test_an_entry_is_complete(score: object) -> None:
    """A new score has a name of its own for each model, a source, and a mention in the README."""
    entry = next(each for each in SCOREBOARD if each is score)
    names = [name for each in SCOREBOARD for name in (each.base, each.tuned)]
    assert names.count(entry.base) == names.count(entry.tuned) == 1
    assert entry.base.startswith("base/")
    assert entry.source
    assert f"{0.5:{entry.form}}"
    assert f"`{entry.tuned}`" in README.read_text(), f"the README's list of metrics lacks {entry.tuned}"
