"""Runs and their statuses, on a real sqlite store."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.models import log_model
from ops.tracking.runs import RunRef, opening, tracked_run


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data root with its own store."""
    return Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_the_run_ends_as_the_flow_did(settings: Settings, error: type[BaseException] | None, status: str) -> None:
    """An exception is a failure, a signal or an interrupt is not; nothing stays RUNNING."""
    mlflow = client(settings.tracking_uri)
    expected = pytest.raises(error) if error else nullcontext()
    with expected, tracked_run(settings, "a run", {"epochs": 1}, {}) as run:
        assert mlflow.get_run(run.run_id).info.status == "RUNNING"
        if error:
            raise error
    finished = mlflow.get_run(run.run_id)
    assert finished.info.status == status
    assert finished.data.params == {"epochs": "1"}
    assert mlflow.get_experiment(run.experiment_id).artifact_location == settings.artifacts.as_uri()


def test_two_models_are_two_versions(settings: Settings) -> None:
    """Registering again adds a version; each leads to its own files."""
    import mlflow

    directory = settings.data_root / "model"
    directory.mkdir()
    versions = []
    for content in ("one", "two"):
        (directory / "weights").write_text(content)
        with tracked_run(settings, content, {}, {}) as run:
            versions.append(log_model(run, directory, "gpt2-code-test", {}, {"test/loss": 1.0}, 3))
    assert [int(version.version) for version in versions] == [1, 2]
    for version, content in zip(versions, ("one", "two"), strict=True):
        local = mlflow.artifacts.download_artifacts(f"models:/gpt2-code-test/{version.version}/weights")
        assert Path(local).read_text() == content


@pytest.mark.parametrize("truncate", ["true", "false"])
def test_a_parameter_that_is_too_long_for_mlflow(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, truncate: str
) -> None:
    """mlflow#6183: it is neither cut in silence nor refused; it ends with the artifact that has all of it."""
    import mlflow.artifacts

    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", truncate)
    longest, longer = "a" * 6000, "b" * 6000 + "end"
    with tracked_run(settings, "a run", {"weights_dir": longest, "dataset": longer, "epochs": 1}, {}) as run:
        pass
    params = client(settings.tracking_uri).get_run(run.run_id).data.params
    assert params["weights_dir"] == longest
    assert params["epochs"] == "1"
    assert len(params["dataset"]) == 6000
    assert params["dataset"].endswith("bb... (6,003 characters: the artifact params/dataset.txt has all of them)")
    artifact = f"runs:/{run.run_id}/params/dataset.txt"
    assert mlflow.artifacts.load_text(artifact) == longer


def test_how_to_open_a_run() -> None:
    """With a server its page; without one the command that starts MLflow's pages, and the page's address there."""
    page = "/#/experiments/1/runs/abc?workflowType=machine_learning"
    assert opening(RunRef("http://user:secret@mlflow:80", "1", "abc")) == [f"page: http://mlflow:80{page}"]
    command, address = opening(RunRef("sqlite:////data of mine/mlflow.db", "1", "abc"))
    assert command.startswith("pages: ")
    program, *options = shlex.split(command.removeprefix("pages: "))
    assert Path(program).is_file()
    assert options == ["ui", "--backend-store-uri", "sqlite:////data of mine/mlflow.db", "--port", "5000"]
    assert address == f"then: http://127.0.0.1:5000{page}"
