"""What a sweep reads of its trials from the disk."""

from __future__ import annotations

import logging
from pathlib import Path

from model.engine.config import TrainConfig
from model.engine.journal import MetricsJournal
from model.engine.trainer import JOURNAL_FILE
from model.net.freezing import FreezePlan
from tasks.references import ModelRef, SweepRef, TokensRef, TrainingRef, TrialRef
from tasks.trial_records import curves_of_others, unfinished, write_outcome

LOG = logging.getLogger(__name__)


def trial_of(directory: Path, name: str) -> TrialRef:
    """A trial of ten steps, validated after five of them."""
    tokens = TokensRef("", "", "", {"rows": {"train": 80}})
    model = ModelRef("tiny", "", "", "", "", {}, {}, {})
    plan = FreezePlan(None, False, (), 0, 1)
    config = TrainConfig(epochs=1, batch_size=8)
    journal = MetricsJournal(directory / name / JOURNAL_FILE)
    journal.append(0, {"eval/loss": 3.0})
    journal.append(5, {"eval/loss": 2.0})
    return TrialRef(name, {}, {}, TrainingRef(tokens, model, plan, config, {}, name, str(directory / name)))


def test_a_trial_counts_for_the_median_as_soon_as_its_steps_are_done(tmp_path: Path) -> None:
    """Its outcome is recorded later, while the next trial trains. A failed trial never counts."""
    trials = {name: trial_of(tmp_path, name) for name in ("recorded", "failed", "trained", "elsewhere", "mine")}
    sweep = SweepRef("", str(tmp_path), tuple(trials.values()), True)
    write_outcome(trials["recorded"], unfinished(trials["recorded"], True, "unpromising", "now"))
    write_outcome(trials["failed"], unfinished(trials["failed"], False, "diverged", "now"))
    curve = [(0.0, 3.0), (0.5, 2.0)]
    assert curves_of_others(sweep, trials["mine"], "now", LOG) == [curve]
    assert curves_of_others(sweep, trials["mine"], "now", LOG, {"trained", "failed", "recorded"}) == [curve] * 2
