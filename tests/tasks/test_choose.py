"""Choosing a night's rows: the reference that is handed on, and the warning that the champion knows the test."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from model.data.config import PrepareConfig
from model.demo import grammar
from ops.settings import Settings
from ops.tracking.ledger import record_night
from ops.tracking.runs import tracked_run
from tasks.choose import choose
from tasks.config import SourceConfig
from tasks.download import download
from tasks.references import Sources, SubsetRef

CONFIG = PrepareConfig(max_length=128, validation_share=0.1)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """Eighty rows, and a store without a night."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    grammar.write_rows(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((tmp_path / "train.jsonl").read_text().splitlines()[:80]) + "\n")
    with disable_run_logger():
        return download.fn(SourceConfig("tiny", str(rows)))


def _choose(sources: Sources, config: PrepareConfig = CONFIG, count: int | None = None) -> SubsetRef | None:
    return choose.fn(sources, "tiny", "rows", config, count, 0.2)


def test_a_choice_is_handed_on_by_reference(
    sources: Sources, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of keys, the same for the same choice; once it was used, the rest with old ones mixed in; then None.

    With another seed rows change their split: the log says how many that the champion knows are test rows now.
    """
    monkeypatch.setattr("tasks.choose.get_run_logger", lambda: logging.getLogger("night"))
    settings = Settings.load()
    first = _choose(sources, count=40)
    assert first is not None
    assert first == _choose(sources, count=40)
    assert (first.fresh, first.replay) == (40, 0)
    assert len(np.load(first.keys)) == 40

    def use(subset: Any) -> None:
        with tracked_run(settings, "a night", {"dataset": "rows"}, {}) as run:
            record_night(run, "gpt2-code-tiny", Path(subset.folder), datetime.now(UTC), {})

    use(first)
    second = _choose(sources)
    assert second is not None
    assert second.replay == round(second.fresh / 4)
    assert len(np.load(second.keys)) == second.fresh + second.replay
    use(second)
    assert _choose(sources) is None
    assert "held out now" not in caplog.text
    _choose(sources, replace(CONFIG, split_seed=7))
    assert "rows held out now, so that the champion looks better than it is" in caplog.text
