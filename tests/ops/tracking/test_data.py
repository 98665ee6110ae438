"""The data set of a run, on a real sqlite store."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.data import log_data
from ops.tracking.runs import RunRef, tracked_run


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data root with its own store."""
    return Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")


def test_runs_on_the_same_new_data_at_once(settings: Settings) -> None:
    """Each gets it as its input, whoever of them is the first to enter it."""
    mlflow = client(settings.tracking_uri)
    experiment = mlflow.create_experiment("finetune")
    together = Barrier(8)

    def log(run: RunRef) -> None:
        together.wait(60)
        log_data(run, "rows.jsonl", None, "ab" * 32)

    with ThreadPoolExecutor(together.parties) as pool:
        runs = [
            RunRef(settings.tracking_uri, experiment, mlflow.create_run(experiment).info.run_id)
            for _ in range(together.parties)
        ]
        list(pool.map(log, runs))

    for run in runs:
        (entry,) = mlflow.get_run(run.run_id).inputs.dataset_inputs
        assert entry.dataset.digest == "ab" * 6


def test_a_data_set_has_schema_and_profile(settings: Settings) -> None:
    """In the form that MLflow's own data sets have, which its pages read."""
    with tracked_run(settings, "a run", {}, {}) as run:
        log_data(run, "/data/rows.jsonl", None, "ab" * 32, {"train_rows": 7, "truncated_share": 0.5})
    ((entry,),) = [client(settings.tracking_uri).get_run(run.run_id).inputs.dataset_inputs]
    assert entry.dataset.name == "rows.jsonl"
    assert json.loads(entry.dataset.profile) == {"train_rows": 7, "truncated_share": 0.5}
    columns = json.loads(entry.dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [
        ("prompt", "string"),
        ("completion", "string"),
    ]
    assert entry.dataset.source_type == "code"
    assert json.loads(entry.dataset.source)["tags"]["source"] == "/data/rows.jsonl"
