"""Logged models and their versions in MLflow's registry: files, their hashes, descriptions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops.tracking.connection import client
from ops.tracking.flavour import hash_version
from ops.tracking.once import create_once, environment
from ops.tracking.runs import MODEL_PREFIX, RunRef, log_metrics
from ops.tracking.views import server_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

FILES_TAG = "files"  # of a logged model: the sha256 of its files by their paths, as JSON
TRAINING_TAG = "training"  # of a version: the identity of the training that it is of
_VERSIONS_TAG = "mlflow.modelVersions"  # of a logged model: its versions in the registry, as JSON
# A server answers an upload only when it has written the file, which takes longer than other requests may.
_UPLOAD_SECONDS = "1800"
LOGGED = "models:/m-"  # begins the source of a version that has a logged model
_DESCRIPTION_CHARACTERS = 4_000  # MLflow takes 5,000, of which a reason needs a few hundred
_BELOW = "\n\n---\n\n"  # between the heading of a description and the rest


def log_model(
    run: RunRef,
    directory: Path,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    step: int,
    training: str = "",
) -> ModelVersion:
    """Log a directory as the run's model, with its metrics, and register it.

    The files are logged unchanged, without a pickled module, so that they load without this code (mlflow#9514).

    Args:
        directory: in Hugging Face's layout, with MLflow's flavour (``add_flavour``) or without.
        name: of the registered model.
        metrics: logged for the model and for the run, at step 0: MLflow shows single values as bars.
        step: of the training that the model comes from.
        training: identity of that training; a later run finds the version by it if this one is interrupted.
    """
    from mlflow.entities import LoggedModelOutput

    mlflow = client(run.tracking_uri)
    texts = {key: str(value) for key, value in params.items()}

    def find_model() -> LoggedModel | None:
        found = mlflow.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'")
        return found[0] if found else None

    def find_version() -> ModelVersion | None:
        found = mlflow.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
        return found[0] if found else None

    model = create_once(
        lambda: mlflow.create_logged_model(run.experiment_id, name, run.run_id, params=texts, model_type="gpt2"),
        find_model,
    )
    with environment("MLFLOW_HTTP_REQUEST_TIMEOUT", _UPLOAD_SECONDS):
        mlflow.log_model_artifacts(model.model_id, str(directory))
    log_metrics(run, metrics, 0, model.model_id)
    mlflow.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
    mlflow.finalize_logged_model(model.model_id, "READY")
    # Not among the tags of the version, where they would fill its page.
    mlflow.set_logged_model_tags(model.model_id, {FILES_TAG: json.dumps(hash_version(directory))})
    _describe_model(mlflow, name)
    version = create_once(
        lambda: mlflow.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run.run_id,
            model_id=model.model_id,
            tags={TRAINING_TAG: training},
            description=", ".join(f"{key} {value:.4f}" for key, value in metrics.items()),
        ),
        find_version,
    )
    if not server_of(run.tracking_uri):  # a server does so itself
        versions = json.dumps([{"name": version.name, "version": str(version.version)}])
        mlflow.set_logged_model_tags(model.model_id, {_VERSIONS_TAG: versions})
    return version


def _describe_model(mlflow: MlflowClient, name: str) -> None:
    """Create a registered model unless it is there, and describe it unless somebody has."""
    from mlflow.exceptions import MlflowException

    size = name.removeprefix(MODEL_PREFIX)
    text = (
        f"GPT-2 {size}, its top blocks fine-tuned on code instructions. `champion` is the version that nights go on "
        "with; `challenger` is the latest one that was not better. The description of a version has its result."
    )
    try:
        mlflow.create_registered_model(name, description=text)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if not mlflow.get_registered_model(name).description:
            mlflow.update_registered_model(name, text)


def file_hashes(mlflow: MlflowClient, version: ModelVersion) -> str | None:
    """The sha256 of a version's files by their paths, as JSON; None where they were not recorded.

    They are a tag of its logged model; versions of earlier releases have the tag themselves.
    """
    from mlflow.exceptions import MlflowException

    if FILES_TAG in version.tags:
        return str(version.tags[FILES_TAG])
    source = str(version.source)
    if not source.startswith(LOGGED):
        return None
    try:
        found = mlflow.get_logged_model(source.removeprefix("models:/")).tags.get(FILES_TAG)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found and str(found)


def describe_version(mlflow: MlflowClient, version: ModelVersion, text: str) -> None:
    """Set the description, in Markdown, of a version and of its logged model."""
    text = text if len(text) <= _DESCRIPTION_CHARACTERS else f"{text[:_DESCRIPTION_CHARACTERS]}..."
    mlflow.update_model_version(version.name, str(version.version), text)
    if str(version.source).startswith(LOGGED):
        mlflow.set_logged_model_tags(str(version.source).removeprefix("models:/"), {"mlflow.note.content": text})


def put_first(mlflow: MlflowClient, version: ModelVersion, heading: str) -> None:
    """Begin the description of a version with a heading; one that an earlier call has put there is replaced."""
    now = mlflow.get_model_version(version.name, str(version.version)).description or ""
    rest = now.partition(_BELOW)[2] or now
    mlflow.update_model_version(version.name, str(version.version), f"{heading}{_BELOW}{rest}")
