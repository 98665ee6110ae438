"""What a resumed and an interrupted training say."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from model.engine.checkpoint import newest_step
from ops.tracking.connection import client
from ops.tracking.runs import RunRef
from tasks.resume import RESUMED_TAG, begin_attempt, correct_attempt, describe_kept


@pytest.fixture
def runs(tmp_path: Path, mlflow_database: Path) -> list[RunRef]:
    """Three MLflow runs."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    mlflow = client(uri := f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("finetune", tmp_path.as_uri())
    return [RunRef(uri, experiment, mlflow.create_run(experiment).info.run_id) for _ in range(3)]


def _tag(run: RunRef) -> str | None:
    return client(run.tracking_uri).get_run(run.run_id).data.tags.get(RESUMED_TAG)


def test_a_resumed_training_names_step_and_run(
    tmp_path: Path, runs: list[RunRef], caplog: pytest.LogCaptureFixture
) -> None:
    """In the log when it begins, and as a tag."""
    directory = tmp_path / "training"
    directory.mkdir()
    log = logging.getLogger("test")
    with caplog.at_level(logging.INFO, logger="test"):
        assert begin_attempt(runs[0], directory, log) == 0
        assert (_tag(runs[0]), caplog.messages) == (None, [])
        for step in (0, 100, 20):
            (directory / f"step-{step:08}").mkdir()
        (directory / "step-00000200.half").mkdir()  # of a writer that was killed
        assert begin_attempt(runs[1], directory, log) == newest_step(directory) == 100
    assert caplog.messages == [f"resuming at step 100, from the checkpoint of MLflow run {runs[0].run_id}"]
    assert _tag(runs[1]) == f"step 100 of MLflow run {runs[0].run_id}"
    assert begin_attempt(runs[1], directory, log) == 100  # the task is tried again
    assert _tag(runs[1]) == f"step 100 of MLflow run {runs[0].run_id}"
    correct_attempt(runs[1], directory, 100, 100, log)
    assert _tag(runs[1]) == f"step 100 of MLflow run {runs[0].run_id}"
    correct_attempt(runs[1], directory, 100, 20, log)
    assert _tag(runs[1]) == "step 20"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_named(
    tmp_path: Path, runs: list[RunRef], caplog: pytest.LogCaptureFixture
) -> None:
    """The run that saved the checkpoint is, also where the task of a later one is tried again."""
    log = logging.getLogger("test")
    caplog.set_level(logging.INFO, logger="test")
    begin_attempt(runs[0], tmp_path, log)
    (tmp_path / "step-00000100").mkdir()
    begin_attempt(runs[1], tmp_path, log)  # and dies
    begin_attempt(runs[2], tmp_path, log)  # and dies, and is tried again
    begin_attempt(runs[2], tmp_path, log)
    assert caplog.messages == [f"resuming at step 100, from the checkpoint of MLflow run {runs[0].run_id}"] * 3
    assert _tag(runs[2]) == f"step 100 of MLflow run {runs[0].run_id}"
    (tmp_path / "step-00000120").mkdir()
    begin_attempt(runs[2], tmp_path, log)
    assert caplog.messages[3:] == ["resuming at step 120, from the checkpoint of the try before"]
    correct_attempt(runs[2], tmp_path, 120, 100, log)  # that one is damaged
    (tmp_path / "step-00000120").rmdir()
    (tmp_path / "step-00000110").mkdir()
    begin_attempt(runs[1], tmp_path, log)
    assert caplog.messages[4:] == [f"resuming at step 110, from the checkpoint of MLflow run {runs[2].run_id}"]


def test_an_earlier_run_that_is_not_known(tmp_path: Path, runs: list[RunRef]) -> None:
    """A training of an earlier version of this project, or a damaged note."""
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "attempt.json").write_text("[")
    assert begin_attempt(runs[0], tmp_path, logging.getLogger("test")) == 4
    assert _tag(runs[0]) == "step 4 of an earlier run"


def test_what_is_kept(tmp_path: Path) -> None:
    """And how to go on."""
    assert describe_kept(tmp_path).startswith("stopped before the first checkpoint")
    (tmp_path / "step-00000012").mkdir()
    assert "a checkpoint of step 12 is kept, and a run with the same parameters goes on" in describe_kept(tmp_path)
