"""What is created in MLflow is created once, although the server's answers are lost: a real server behind a proxy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lost_answers import losing_answers
from world import World

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.models import log_model
from ops.tracking.once import create_once, environment
from ops.tracking.runs import tracked_run

CREATES = ("runs/create", "logged-models", "model-versions/create", "registered-models/create", "experiments/create")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with World(tmp_path_factory.mktemp("mlflow")) as world:
        world.start_mlflow()
        yield world.environment["MLFLOW_TRACKING_URI"]


def test_a_server_that_dies_before_its_answers(server: str, tmp_path: Path) -> None:
    """One experiment, run, model and version, each found again after its answer was lost."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_text("weights")
    with losing_answers(server, *CREATES) as proxy:
        settings = Settings(tmp_path, proxy.url)
        with tracked_run(settings, "a run", {}, {}) as run:
            version = log_model(run, directory, "gpt2-code-once", {}, {"test/loss": 1.0}, 3)
        assert proxy.paths == set(), "each answer was lost once"
    mlflow = client(server)
    (found,) = mlflow.search_runs([run.experiment_id])
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")
    (model,) = mlflow.search_logged_models([run.experiment_id])
    (registered,) = mlflow.search_model_versions("name = 'gpt2-code-once'")
    assert registered.version == version.version == "1"
    assert registered.source == f"models:/{model.model_id}"


def test_a_refusal_is_no_lost_answer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is passed on at once; a server that is gone is asked three times."""
    from mlflow.exceptions import MlflowException

    looked: list[int] = []
    mlflow = client(server)
    with pytest.raises(MlflowException, match="No Experiment with id=77"):
        create_once(lambda: mlflow.create_run("77"), lambda: looked.append(1))
    assert looked == []
    monkeypatch.setattr("ops.tracking.once._PAUSE_SECONDS", 0.0)
    gone = client("http://127.0.0.1:9")
    with pytest.raises(MlflowException):
        create_once(lambda: gone.create_run("0"), lambda: looked.append(1))
    assert looked == [1, 1]


def test_a_variable_is_set_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its value of before again, or none."""
    monkeypatch.delenv("SOME_VARIABLE", raising=False)
    for before in (None, "old"):
        if before:
            monkeypatch.setenv("SOME_VARIABLE", before)
        with environment("SOME_VARIABLE", "new"):
            assert os.environ["SOME_VARIABLE"] == "new"
        assert os.environ.get("SOME_VARIABLE") == before
