"""MLflow's model registry: names, aliases and versions, and a version's files on this machine, verified."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from model.files import atomic_directory, plain_name, write_json
from model.records import parse_record, read_record
from ops.machine.lock import exclusive
from ops.redaction import redact, without_credentials
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.flavour import REGISTERED_META, hash_version, plain_part
from ops.tracking.models import FILES_TAG, TRAINING_TAG, file_hashes
from ops.tracking.registered import ask_registered, not_registered
from ops.tracking.runs import MODEL_PREFIX, PROMOTION_TAG, TAKEN_OVER_TAG, RunRef, log_metrics, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[\w-]+))")
_VERSION_DIGITS = 9  # more do not fit a database's integer, and its error says neither what nor where
_KEPT_SECONDS = 7 * 86_400.0  # then an unused copy of a version is deleted on this machine; MLflow keeps it
_REMEDY = "Restore its artifacts, give the alias back (`make rollback SIZE=...`), or set start_from=base"


def model_name(size: str) -> str:
    """Name of a size's registered model."""
    return MODEL_PREFIX + size


def shared_name(tracking_uri: str, what: str) -> str:
    """A lock's name for ``what`` of one MLflow server; it is the same for all users of the machine."""
    server = without_credentials(tracking_uri)  # users differ in their credentials
    return f"{what} {hashlib.sha256(server.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class KnownVersion:
    """A registered version, as far as its files and its base have to be found.

    Attributes:
        name, version, source, run_id: as in MLflow.
        files: the sha256 of its files by their paths, as JSON; None where they were not recorded.
        folder: where its files lie, if that is a folder of this machine.
        params: of its logged model, such as the base that it was trained from.
    """

    name: str
    version: str
    source: str
    run_id: str
    files: str | None
    folder: Path | None = None
    params: dict[str, str] = field(default_factory=dict)


def version_uri(version: ModelVersion | KnownVersion) -> str:
    """``models:/NAME/VERSION``."""
    return f"models:/{version.name}/{version.version}"


def version_of_alias(mlflow: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with an alias; None if no version has it, or the model is not registered."""
    from mlflow.exceptions import MlflowException

    try:
        number = mlflow.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if number is None else mlflow.get_model_version(name, str(number))


def matched_uri(uri: str) -> re.Match[str] | None:
    """The parts ``name``, ``version`` and ``alias`` of a version's URI; None for a text of another form."""
    match = _URI.fullmatch(uri)
    return match if match and len(match["version"] or "") <= _VERSION_DIGITS else None


def find_version(
    mlflow: MlflowClient, uri: str, what: str = "start_from", others: str = "base, champion, "
) -> ModelVersion:
    """The version of a ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Args:
        what: parameter that has the URI, for messages.
        others: other values that the parameter takes.

    Raises:
        ValueError: the URI has another form.
        LookupError: there is no such version.
    """
    from mlflow.exceptions import MlflowException

    match = _URI.fullmatch(uri)
    if not match:
        raise ValueError(f"{what} {uri!r} is none of {others}models:/NAME/VERSION and models:/NAME@ALIAS")
    try:
        if match["alias"]:
            found = version_of_alias(mlflow, match["name"], match["alias"])
        elif len(match["version"]) > _VERSION_DIGITS:
            found = None
        else:
            found = mlflow.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":  # such as the name ".."
            raise ValueError(f"{what} {uri!r} cannot be a version: {error}") from error
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None:
        raise not_registered(uri, mlflow.tracking_uri, ask_registered(mlflow, match["name"]))
    return found


def champion(settings: Settings, size: str) -> ModelVersion | None:
    """The champion of a size; None if there is none."""
    return version_of_alias(client(settings.tracking_uri), model_name(size), CHAMPION)


def finishing_run(version: ModelVersion) -> str:
    """Id of the run that published a version to the end, or tried to last: not the one that registered it, always."""
    return str(version.tags.get(TAKEN_OVER_TAG) or version.run_id)


def interrupted_version(run: RunRef, directory: Path, name: str, training: str) -> ModelVersion | None:
    """The version that an interrupted run of a training has registered already; None if there is none.

    The caller holds the training, so that another run of it that is not FINISHED has died or failed.

    Args:
        directory: the version must have the same model.
        name: of the registered model.
        training: identity of the training.
    """
    mlflow = client(run.tracking_uri)
    condition = f"name = '{name}' and tags.`{TRAINING_TAG}` = '{training}'"
    for version in mlflow.search_model_versions(condition, order_by=["version_number DESC"]):
        # Without the flavour, whose files name the versions of Python and MLflow.
        recorded = json.loads(file_hashes(mlflow, version) or "{}")
        same = plain_part(recorded) == plain_part(hash_version(directory))
        if same and not _is_finished(mlflow, finishing_run(version)):
            return version
    return None


def _is_finished(mlflow: MlflowClient, run_id: str) -> bool:
    """Whether a run is FINISHED, or was deleted for good."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(mlflow.get_run(run_id).info.status == "FINISHED")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True


def take_over(run: RunRef, version: ModelVersion, metrics: Mapping[str, float], step: int) -> None:
    """Make the version that an interrupted run registered the model of this run.

    Args:
        metrics: logged for the run, at step 0.
        step: of the training that the model comes from.
    """
    from mlflow.entities import LoggedModelOutput

    mlflow = client(run.tracking_uri)
    mlflow.set_model_version_tag(version.name, str(version.version), TAKEN_OVER_TAG, run.run_id)
    mlflow.log_outputs(run.run_id, [LoggedModelOutput(str(version.source).removeprefix("models:/"), step)])
    log_metrics(run, metrics, 0)


def starting_uri(tracking_uri: str, start_from: str, size: str) -> str | None:
    """The ``models:/NAME/VERSION`` to start from; None for the base, and where there is no champion yet.

    Args:
        start_from: "base", "champion" or the URI of a registered version.

    Raises:
        ValueError, LookupError: the URI has another form, there is no such version, or the champion is lost.
    """
    if start_from == "base":
        return None
    mlflow = client(tracking_uri)
    if start_from != CHAMPION:
        return version_uri(find_version(mlflow, start_from))
    version = version_of_alias(mlflow, model_name(size), CHAMPION)
    if version is None:
        _refuse_a_lost_champion(tracking_uri, size)
        return None
    return version_uri(version)


def _refuse_a_lost_champion(tracking_uri: str, size: str) -> None:
    """Refuse to start from the base where a run has made a champion: the nights' work would be lost in silence.

    Raises:
        LookupError: a run of this size made its version champion.
    """
    condition = f"tags.{PROMOTION_TAG} = '{CHAMPION}' and params.model_size = '{size}'"
    run = next(search_runs(tracking_uri, condition, ["attributes.start_time DESC"]), None)
    if run is not None:
        raise LookupError(
            f"the MLflow run {run.info.run_id} ({run.info.run_name}) made its version of {model_name(size)} "
            f"champion, and the registry at {without_credentials(tracking_uri)} has no champion any more: give the "
            f"alias {CHAMPION} to a version on the model's page in MLflow, register the model of that run again, or "
            "set start_from=base to start without the earlier nights"
        )


def fetch_version(
    settings: Settings, version: ModelVersion | KnownVersion, log: Callable[[str], None], remedy: str = _REMEDY
) -> tuple[Path, dict[str, str]]:
    """Download a version's files once, and verify them before each use.

    Their hashes are compared with those registered with the version. A version registered by an older release has no
    hashes: those of the first download are used.

    Args:
        remedy: the end of an error message: what to do.

    Returns:
        The directory, and the sha256 of each file by its path in it.

    Raises:
        RuntimeError: the files cannot be had, or are not those that were registered.
        ValueError: the server gives the model a name that is a path.
    """
    uri = version_uri(version)
    plain_name(version.name, f"MLflow at {without_credentials(settings.tracking_uri)}")
    # On another server the same name and number are another model.
    key = hashlib.sha256(f"{version.source} {version.run_id}".encode()).hexdigest()[:12]
    directory = settings.models / f"{version.name}-{version.version}-{key}"
    record = directory.with_suffix(".json")
    with exclusive(settings.locks, f"files of {directory.name}", uri, log):
        if isinstance(version, KnownVersion):
            tag, folder = version.files, version.folder
        else:
            tag, folder = file_hashes(client(settings.tracking_uri), version), None
        expected = _recorded(tag, uri, record)
        found = hash_version(directory)
        if not found or found != expected:
            if found:
                log(f"{directory} is not {uri} as registered: it is downloaded again")
            _download(settings.tracking_uri, uri, folder, directory, remedy)
            found = hash_version(directory)
            if not expected:
                expected = found
                write_json(record, found)
        if found != expected:
            wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise RuntimeError(
                f"{uri} is not what was registered: {', '.join(wrong)} missing or of another sha256. {remedy}"
            )
        os.utime(directory)
    _remove_unused(settings.models)
    return directory, found


def _recorded(tag: str | None, uri: str, record: Path) -> dict[str, str]:
    """The sha256 of a version's files, as registered or as first seen; empty where neither is known.

    Args:
        tag: what is registered.

    Raises:
        RuntimeError: what is recorded is damaged.
    """
    try:
        if tag:
            what = f"the tag {FILES_TAG} of {uri} in MLflow"
            return parse_record(tag, dict[str, str], what)
        return read_record(record, dict[str, str]) if record.exists() else {}
    except ValueError as error:
        remedy = "Restore it" if tag else "Remove it to trust the files that MLflow has now"
        raise RuntimeError(f"{error}. {remedy}") from error


def _download(tracking_uri: str, uri: str, folder: Path | None, directory: Path, remedy: str) -> None:
    """Copy a version's files from their folder, or download them."""
    with atomic_directory(directory) as scratch:
        try:
            if folder:
                shutil.copytree(folder, scratch, dirs_exist_ok=True)
            else:
                _download_from_mlflow(tracking_uri, uri, scratch)
            (scratch / REGISTERED_META).unlink(missing_ok=True)
            if not hash_version(scratch):  # MLflow reports success without a file
                raise FileNotFoundError("there are none")
        except Exception as error:  # MLflow, its HTTP client and the disk raise different ones
            where = without_credentials(tracking_uri)
            reason = redact(str(error))
            raise RuntimeError(f"the files of {uri} cannot be had from {where}: {reason}. {remedy}") from error


def _download_from_mlflow(tracking_uri: str, uri: str, target: Path) -> None:
    import mlflow

    # It says at INFO that there are no files; the caller's error says so too.
    logging.getLogger("mlflow.store.artifact.artifact_repo").setLevel(logging.WARNING)
    client(tracking_uri)  # makes it MLflow's own
    mlflow.artifacts.download_artifacts(uri, dst_path=str(target))


def _remove_unused(models: Path) -> None:
    for directory in models.iterdir():
        if directory.is_dir() and time.time() - directory.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(directory, ignore_errors=True)
