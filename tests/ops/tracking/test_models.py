"""What MLflow's pages show of a logged model and of its version in the registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.flavour import hash_version
from ops.tracking.models import describe_version, file_hashes, log_model, put_first
from ops.tracking.runs import tracked_run

NAME = "gpt2-code-tiny"


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path) -> Settings:
    return Settings(tmp_path / "root", f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def version(settings: Settings, directory: Path) -> Any:
    with tracked_run(settings, "a run", {}, {}) as run:
        return log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3, "identity")


def test_the_tags_of_a_version_are_short(settings: Settings, version: Any, directory: Path) -> None:
    """The hashes of its files are tags of the logged model, and are found there."""
    assert version.tags == {"training": "identity"}
    assert json.loads(file_hashes(client(settings.tracking_uri), version) or "") == hash_version(directory)


def test_a_logged_model_knows_its_version_without_a_server(settings: Settings, version: Any) -> None:
    """MLflow's server sets this tag, and its pages read it; on sqlite nobody would."""
    tags = client(settings.tracking_uri).get_logged_model(version.source.removeprefix("models:/")).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]


def test_a_registered_model_is_described_once(settings: Settings, version: Any, directory: Path) -> None:
    """A description that somebody has written stays; a missing one of an earlier release is added."""
    mlflow = client(settings.tracking_uri)
    made = mlflow.get_registered_model(NAME).description
    assert made.startswith("GPT-2 tiny, its top blocks fine-tuned on code instructions.")
    for before, after in (("my own words", "my own words"), ("", made)):
        mlflow.update_registered_model(NAME, before)
        with tracked_run(settings, "another run", {}, {}) as run:
            log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3)
        assert mlflow.get_registered_model(NAME).description == after


def test_the_reason_stands_first_and_once(settings: Settings, version: Any) -> None:
    """Above the result; a repeated promotion replaces it; a description as long as MLflow takes is cut."""
    mlflow = client(settings.tracking_uri)
    describe_version(mlflow, version, "The result." + "x" * 9000)
    put_first(mlflow, version, "**Challenger: worse.**")
    put_first(mlflow, version, "**Champion: better.**")
    text = mlflow.get_model_version(NAME, "1").description
    assert text.startswith("**Champion: better.**\n\n---\n\nThe result.xxx")
    assert "Challenger" not in text
    assert len(text) < 5000
    model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert model.tags["mlflow.note.content"].startswith("The result.")
