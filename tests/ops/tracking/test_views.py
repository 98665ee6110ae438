"""The ready-made view, as MLflow's pages read it. That they show it is seen in tests/ops/stack/test_pages.py."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest
from finished_runs import own_settings

from model.evaluation.scores import SCOREBOARD, VALIDATION_LOSS
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.runs import tracked_run
from ops.tracking.views import provide_view

TAG = "mlflow.sharedViewState.finetune-scores"


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path) -> Settings:
    return own_settings(tmp_path, mlflow_database)


def _tags(settings: Settings) -> dict[str, str]:
    return dict(client(settings.tracking_uri).get_experiment_by_name("finetune").tags)


def test_a_run_provides_the_view_once(settings: Settings) -> None:
    for name in ("one", "two"):
        with tracked_run(settings, name, {}, {}):
            pass
        view = _tags(settings)[TAG]
        if name == "one":
            first = view
    assert view == first, "the second run leaves it alone"
    stored = json.loads(view)
    assert stored["name"] == "Scores"
    state = json.loads(zlib.decompress(base64.b64decode(stored["state"].removeprefix("deflate;"))))
    metrics = {chart["metricKey"] for chart in state["compareRunCharts"]}
    known = {score.tuned for score in (VALIDATION_LOSS, *SCOREBOARD)} | {"eval/loss", "train/loss"}
    assert {"test/loss", "best/eval_loss", "eval/loss", "train/loss"} <= metrics <= known
    columns = {column for column in state["selectedColumns"] if column.startswith("metrics.")}
    assert {"metrics.`test/loss`", "metrics.`best/eval_loss`"} <= columns <= {f"metrics.`{name}`" for name in known}
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections
    assert len(view) < 20_000, "MLflow's limit for a tag of an experiment"


@pytest.mark.parametrize("damaged", ["", "x", "[]", "{}", "null"])
def test_a_damaged_view_is_replaced(settings: Settings, damaged: str) -> None:
    with tracked_run(settings, "one", {}, {}) as run:
        mlflow = client(settings.tracking_uri)
        provide_view(mlflow, run.experiment_id, {TAG: damaged})
    assert json.loads(_tags(settings)[TAG])["name"] == "Scores"


def test_the_experiment_is_described_once(settings: Settings) -> None:
    """What somebody has written instead stays."""
    note = "mlflow.note.content"
    with tracked_run(settings, "one", {}, {}) as run:
        assert _tags(settings)[note].startswith("GPT-2 fine-tuned on code instructions by the flows")
    client(settings.tracking_uri).set_experiment_tag(run.experiment_id, note, "our experiment")
    with tracked_run(settings, "two", {}, {}):
        assert _tags(settings)[note] == "our experiment"
