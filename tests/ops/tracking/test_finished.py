"""Finished runs as they are read back, from a real sqlite store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import log_finished, make_records, own_settings

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.finished import read_run, resolve
from ops.tracking.runs import tracked_run


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path) -> Settings:
    return own_settings(tmp_path, mlflow_database)


def test_what_was_logged_is_read_back(settings: Settings) -> None:
    records = make_records(5)
    run = read_run(settings.tracking_uri, log_finished(settings, "a run", records, {"epochs": 1}).run_id)
    assert run.records
    for read, made in zip(run.records, records, strict=True):
        assert read == {
            name: pytest.approx(value) if isinstance(value, float) else value for name, value in made.items()
        }
    assert (run.name, run.status, run.seed) == ("a run", "FINISHED", 42)
    assert run.changed == {"epochs": (1, 3)}
    assert run.tags["changed"] == "epochs=1"
    assert run.curve("eval/loss") == [(0, 2.5), (10, pytest.approx(2.5 / 11)), (20, pytest.approx(2.5 / 21))]
    assert run.files == [{"file": "rows.jsonl", "split": "train", "rows": 60}]
    assert run.fact("data/train_rows") == "60"
    assert run.fact("data/test_rows") == ""


def test_a_run_without_files_is_read_as_far_as_it_goes(settings: Settings) -> None:
    """A run that failed early, or of a version before the report: no records, and old names of metrics."""
    with tracked_run(settings, "old", {"epochs": 1}, {}) as ref:
        client(ref.tracking_uri).log_metric(ref.run_id, "base/test_loss", 2.5)
        client(ref.tracking_uri).log_metric(ref.run_id, "data/train_rows", 60)
        client(ref.tracking_uri).log_dict(
            ref.run_id, {"columns": ["row", "prompt", "tokens"], "data": [[0, "x", 5]]}, "tables/test_rows.json"
        )
    run = read_run(settings.tracking_uri, ref.run_id)
    assert run.records is None
    assert run.changed is None
    assert run.journal == []
    assert run.metrics["untuned/test_loss"] == 2.5
    assert run.fact("data/train_rows") == "60"


def _with(**changed: Any) -> str:
    """A table of one record with changed values."""
    (record,) = make_records(1)
    record |= changed
    return json.dumps({"columns": list(record), "data": [list(record.values())]})


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("tables/test_rows.json", "not JSON"),
        ("tables/test_rows.json", json.dumps({"columns": ["key"], "data": [["a", "b"]]})),
        ("tables/test_rows.json", json.dumps({"columns": ["key", "row"], "data": [["a", 1]]})),
        ("tables/test_rows.json", json.dumps([1])),
        ("tables/test_rows.json", _with(tokens="many")),
        ("tables/test_rows.json", _with(tokens=0)),
        ("tables/test_rows.json", _with(text=5)),
        ("tables/test_rows.json", _with(chrf="high")),
        ("tables/test_rows.json", _with(base_loss=[1])),
        ("tables/test_rows.json", _with(loss=1e308)),
        ("tables/test_rows.json", _with(length=10**400)),
        ("tables/data_files.json", json.dumps({"columns": 1})),
        ("changed.json", json.dumps({"epochs": 1})),
    ],
)
def test_a_damaged_file_is_named(settings: Settings, path: str, content: str) -> None:
    ref = log_finished(settings, "a run", make_records(2))
    client(ref.tracking_uri).log_text(ref.run_id, content, path)
    with pytest.raises(ValueError, match=f"{path} of the run {ref.run_id} is damaged: "):
        read_run(settings.tracking_uri, ref.run_id)


def test_a_version_means_the_run_that_finished_it(settings: Settings) -> None:
    first, second = (log_finished(settings, name, None) for name in ("first", "second"))
    mlflow = client(settings.tracking_uri)
    mlflow.create_registered_model("gpt2-code-tiny")
    mlflow.create_model_version("gpt2-code-tiny", "nowhere", first.run_id)
    mlflow.set_registered_model_alias("gpt2-code-tiny", "champion", "1")
    for name in ("models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny@champion"):
        assert resolve(settings.tracking_uri, name) == first.run_id
    assert read_run(settings.tracking_uri, first.run_id).versions == ("models:/gpt2-code-tiny/1",)
    mlflow.set_model_version_tag("gpt2-code-tiny", "1", "taken_over_by", second.run_id)
    assert resolve(settings.tracking_uri, "models:/gpt2-code-tiny/1") == second.run_id


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("champion", ValueError, "'champion' is none of a run id"),
        ("../../x", ValueError, "is none of a run id"),
        ("models:/a/b/c", ValueError, "run 'models:/a/b/c' is none of a run id"),
        ("models:/gpt2-code-tiny/7", LookupError, "models:/gpt2-code-tiny/7 is not registered at"),
        ("models:/gpt2-code-tiny@champion", LookupError, "is not registered at"),
        ("0" * 32, LookupError, f"there is no run {'0' * 32} at sqlite:"),
    ],
)
def test_a_name_that_means_no_run(settings: Settings, name: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        read_run(settings.tracking_uri, name)
