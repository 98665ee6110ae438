"""A version's files: fetched once, verified before each use; and what is said when they cannot be had."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.models import FILES_TAG, log_model
from ops.tracking.registry import (
    champion,
    fetch_version,
    find_version,
    finishing_run,
    interrupted_version,
    starting_uri,
    take_over,
    version_of_alias,
    version_uri,
)
from ops.tracking.runs import tracked_run

NAME = "gpt2-code-tiny"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store with two versions of a model, of which the second is champion. Read only but for what a test adds."""
    root = tmp_path_factory.mktemp("registry")
    settings = Settings(root, f"sqlite:///{root}/mlflow/mlflow.db")
    directory = root / "model"
    directory.mkdir()
    for content in ("one", "two"):
        (directory / "model.safetensors").write_text(content)
        (directory / "config.json").write_text("{}")
        with tracked_run(settings, content, {}, {}) as run:
            log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3)
    client(settings.tracking_uri).set_registered_model_alias(NAME, "champion", "2")
    return settings


@pytest.fixture
def machine(store: Settings, tmp_path: Path) -> Settings:
    """Another machine: a data root of the test's own, the same tracking server."""
    return Settings(tmp_path / "root", store.tracking_uri)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of MLflow."""
    import mlflow

    asked: list[str] = []
    real = mlflow.artifacts.download_artifacts

    def counted(uri: str, **options: Any) -> str:
        asked.append(uri)
        return real(uri, **options)

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", counted)
    return asked


def _fetch(machine: Settings, version: str = "2") -> Path:
    found = client(machine.tracking_uri).get_model_version(NAME, version)
    directory, files = fetch_version(machine, found, print)
    assert set(files) == {"config.json", "model.safetensors"}
    return directory


def _stored(store: Settings, version: str) -> Path:
    """Where MLflow itself keeps a version's weights."""
    source = client(store.tracking_uri).get_model_version(NAME, version).source.removeprefix("models:/")
    return store.artifacts / "models" / source / "artifacts" / "model.safetensors"


def test_who_is_champion(store: Settings) -> None:
    """By alias, by number; nobody, where nobody is."""
    mlflow = client(store.tracking_uri)
    found = champion(store, "tiny")
    assert found is not None
    assert version_uri(found) == f"models:/{NAME}/2"
    for uri, number in ((f"models:/{NAME}/1", 1), (f"models:/{NAME}@champion", 2)):
        assert int(find_version(mlflow, uri).version) == number
    assert champion(store, "355m") is None  # never registered
    assert version_of_alias(mlflow, NAME, "challenger") is None


@pytest.mark.parametrize(
    "uri",
    [f"models:/{NAME}/3", f"models:/{NAME}@best", "models:/gpt2-code-124m/1", f"models:/{NAME}/{'9' * 23}"],
)
def test_a_version_that_is_not_there(store: Settings, uri: str) -> None:
    """The sentence names the server that was asked."""
    with pytest.raises(LookupError, match=r"is not registered at sqlite:.*MLFLOW_TRACKING_URI"):
        find_version(client(store.tracking_uri), uri)


@pytest.mark.parametrize(
    "uri", ["models:/m-0123456789abcdef", f"models:/{NAME}", "runs:/1/model", f"models:/{NAME}/x"]
)
def test_a_uri_of_another_form(store: Settings, uri: str) -> None:
    """The forms that are taken are named."""
    with pytest.raises(ValueError, match="none of base, champion, models:/NAME/VERSION"):
        find_version(client(store.tracking_uri), uri)


def test_files_are_fetched_once(machine: Settings, downloads: list[str]) -> None:
    """The second use finds them; another version is another directory."""
    first = _fetch(machine)
    assert (first / "model.safetensors").read_text() == "two"
    assert _fetch(machine) == first
    assert (_fetch(machine, "1") / "model.safetensors").read_text() == "one"
    assert downloads == [f"models:/{NAME}/2", f"models:/{NAME}/1"]


@pytest.mark.parametrize("damage", ["a flipped byte", "a missing file", "a file too many"])
def test_damaged_files_are_fetched_anew(machine: Settings, downloads: list[str], damage: str) -> None:
    """They are hashed before each use."""
    directory = _fetch(machine)
    weights = directory / "model.safetensors"
    if damage == "a missing file":
        weights.unlink()
    else:
        (weights if damage == "a flipped byte" else directory / "more").write_text("twp")
    assert _fetch(machine) == directory
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert weights.read_text() == "two"
    assert len(downloads) == 2


@pytest.fixture
def spare(store: Settings, tmp_path: Path) -> Any:
    """A third version, to be damaged."""
    with tracked_run(store, "three", {}, {}) as run:
        directory = tmp_path / "spare"
        directory.mkdir()
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_text("three")
        version = log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3)
    yield version
    client(store.tracking_uri).delete_model_version(NAME, str(version.version))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.write_text("other"), r"model\.safetensors missing or of another sha256"),
        (lambda path: path.unlink(), r"model\.safetensors missing or of another sha256"),
        (lambda path: shutil.rmtree(path.parent), r"the files of .* cannot be had from sqlite:.*there are none"),
    ],
)
def test_files_that_are_not_what_was_registered(
    store: Settings, machine: Settings, spare: Any, damage: Callable[[Path], Any], complaint: str
) -> None:
    """A version damaged where MLflow keeps it is refused, with the ways out."""
    damage(_stored(store, spare.version))
    with pytest.raises(RuntimeError, match=f"{complaint}.*make rollback SIZE=.*start_from=base"):
        fetch_version(machine, spare, print)


def _forget_hashes(store: Settings, version: Any) -> None:
    client(store.tracking_uri).delete_logged_model_tag(version.source.removeprefix("models:/"), FILES_TAG)


def test_hashes_in_the_tags_of_a_version(store: Settings, machine: Settings, spare: Any) -> None:
    """Where earlier releases kept them: the files are compared with them as before."""
    mlflow = client(store.tracking_uri)
    tag = mlflow.get_logged_model(spare.source.removeprefix("models:/")).tags[FILES_TAG]
    _forget_hashes(store, spare)
    mlflow.set_model_version_tag(NAME, str(spare.version), FILES_TAG, tag)
    _stored(store, spare.version).write_text("changed")
    with pytest.raises(RuntimeError, match=r"model\.safetensors missing or of another sha256"):
        fetch_version(machine, mlflow.get_model_version(NAME, str(spare.version)), print)


def test_a_version_of_an_older_release(store: Settings, machine: Settings, spare: Any, downloads: list[str]) -> None:
    """Without registered hashes the first download counts; what changes afterwards is found out."""
    _forget_hashes(store, spare)
    old = client(store.tracking_uri).get_model_version(NAME, str(spare.version))
    directory, _ = fetch_version(machine, old, print)
    assert fetch_version(machine, old, print)[0] == directory
    assert len(downloads) == 1
    (directory / "config.json").write_text("changed")
    fetch_version(machine, old, print)
    assert (directory / "config.json").read_text() == "three"
    _stored(store, spare.version).write_text("changed")
    shutil.rmtree(directory)
    with pytest.raises(RuntimeError, match=r"model\.safetensors missing or of another sha256"):
        fetch_version(machine, old, print)


def test_versions_nobody_uses_are_deleted(machine: Settings) -> None:
    """Champions come and go, and each is gigabytes: after a week without use MLflow's copy is enough."""
    old, used = _fetch(machine, "1"), _fetch(machine, "2")
    for directory, days in ((old, 8), (used, 9)):
        moment = time.time() - days * 86_400
        os.utime(directory, (moment, moment))
    assert _fetch(machine, "2") == used
    assert [path for path in machine.models.iterdir() if path.is_dir()] == [used]


@pytest.mark.parametrize("content", ["null", "[]", "{", '{"config.json": 3}'])
def test_a_damaged_record_of_first_use_is_named(store: Settings, machine: Settings, spare: Any, content: str) -> None:
    """It is neither taken for an absent one, nor trusted."""
    number = str(spare.version)
    _forget_hashes(store, spare)
    record = _fetch(machine, number).with_suffix(".json")
    record.write_text(content)
    with pytest.raises(RuntimeError, match=rf"{record.name} is damaged: .*Remove it to trust"):
        _fetch(machine, number)
    client(store.tracking_uri).set_model_version_tag(NAME, number, FILES_TAG, content)
    with pytest.raises(RuntimeError, match=r"the tag files of models:/.* is damaged: "):
        _fetch(machine, number)


def test_a_lost_champion_is_not_replaced_by_the_base(tmp_path: Path) -> None:
    """A run made a champion and the registry has none: the night stops, with the ways out; another size goes on."""
    settings = Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    uri, mlflow = settings.tracking_uri, client(settings.tracking_uri)
    assert starting_uri(uri, "champion", "tiny") is None
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    with tracked_run(settings, "a night", {"model_size": "tiny"}, {}) as run:
        log_model(run, directory, NAME, {}, {"test/loss": 1.0}, 3)
    assert starting_uri(uri, "champion", "tiny") is None
    mlflow.set_registered_model_alias(NAME, "champion", "1")
    mlflow.set_tag(run.run_id, "promotion", "champion")
    assert starting_uri(uri, "champion", "tiny") == f"models:/{NAME}/1"
    lost = rf"{run.run_id} .*no champion any more.*start_from=base"
    mlflow.delete_registered_model_alias(NAME, "champion")  # as the message of a rollback of the first one suggests
    with pytest.raises(LookupError, match=lost):
        starting_uri(uri, "champion", "tiny")
    mlflow.delete_model_version(NAME, "1")
    with pytest.raises(LookupError, match=lost):
        starting_uri(uri, "champion", "tiny")
    mlflow.delete_registered_model(NAME)
    with pytest.raises(LookupError, match=lost):
        starting_uri(uri, "champion", "tiny")
    assert starting_uri(uri, "base", "tiny") is None
    assert starting_uri(uri, "champion", "124m") is None
    mlflow.delete_run(run.run_id)
    assert starting_uri(uri, "champion", "tiny") is None


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Any]:
    """publish(content="weights", error=None, training="t1"): a run that registers or takes over, and may fail."""
    settings = Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    directory = tmp_path / "model"
    directory.mkdir()

    def run(content: str = "weights", error: type[BaseException] | None = None, training: str = "t1") -> Any:
        (directory / "model.safetensors").write_text(content)
        with suppress(KeyboardInterrupt, OSError), tracked_run(settings, "a run", {}, {}) as ref:
            version = interrupted_version(ref, directory, NAME, training)
            if version:
                take_over(ref, version, {"test/loss": 1.0}, 3)
            else:
                version = log_model(ref, directory, NAME, {}, {"test/loss": 1.0}, 3, training)
            if error:
                raise error
        return ref, client(ref.tracking_uri).get_model_version(NAME, str(version.version))

    return run


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_an_interrupted_run_registered_is_taken_over(publish: Callable[..., Any], error: Any) -> None:
    """However often a training is interrupted behind its registration, it has one version."""
    _, first = publish(error=error)
    publish(error=error)
    run, version = publish()
    assert first.version == version.version
    assert finishing_run(version) == run.run_id != version.run_id
    found = client(run.tracking_uri).get_run(run.run_id)
    assert found.data.metrics == {"test/loss": 1.0}
    (output,) = found.outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"


def test_what_is_not_taken_over(publish: Callable[..., Any]) -> None:
    """A version of a finished run, of another training, and one with other files."""
    publish()
    publish(error=OSError)
    publish(training="t2")
    _, last = publish(content="others")
    assert int(last.version) == 4
    run, version = publish()
    assert int(version.version) == 2
    mlflow = client(run.tracking_uri)
    publish(content="deleted", error=OSError)
    mlflow.delete_run(mlflow.get_model_version(NAME, "5").run_id)
    assert int(publish(content="deleted")[1].version) == 5
