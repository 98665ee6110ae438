"""A version of MLflow's registry, looked up for `make sample` without waiting for MLflow.

Importing MLflow and opening its database takes some two seconds. Where the registry is a local sqlite file, its
tables are read here instead; where they cannot be read, and with a server, MLflow's client is asked.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ops.databases import sqlite_path
from ops.tracking.connection import client, require_runs
from ops.tracking.models import FILES_TAG, LOGGED, file_hashes
from ops.tracking.registered import Registered, ask_registered, not_registered, quoted
from ops.tracking.registry import KnownVersion, find_version, matched_uri
from ops.tracking.runs import MODEL_PREFIX

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_LIVE = "current_stage != 'Deleted_Internal'"  # a version that was deleted stays in the table, in a stage of its own


def look_up(tracking_uri: str, wanted: str | None) -> KnownVersion:
    """The version that a name means.

    Args:
        wanted: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, the id of a run, or the name of a registered model
            for its latest version; None for the latest version of all that this project registers.

    Raises:
        LookupError: there is no such version.
        ValueError: the name has another form.
    """
    require_runs(tracking_uri)
    if path := sqlite_path(tracking_uri):
        try:
            with closing(_open(path)) as database:
                return _Tables(database, tracking_uri).look_up(wanted)
        except sqlite3.Error:  # MLflow names a damaged database
            pass
    return _ask(client(tracking_uri), wanted)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)


class _Tables:
    """MLflow's tables of the registry."""

    def __init__(self, database: sqlite3.Connection, tracking_uri: str):
        self.database, self.tracking_uri = database, tracking_uri

    def look_up(self, wanted: str | None) -> KnownVersion:
        match = matched_uri(wanted) if wanted else None
        latest = "ORDER BY creation_time DESC, version DESC LIMIT 1"
        if wanted is None:
            found = self._version("name LIKE ?", (f"{MODEL_PREFIX}%",), latest)
        elif match:
            name, number = match["name"], match["version"]
            if match["alias"]:
                alias = (name, match["alias"])
                rows = self._rows("SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?", alias)
                number = str(rows[0][0]) if rows else None
            found = self._version("name = ? AND version = ?", (name, int(number))) if number else None
        elif wanted.startswith("models:"):
            return _ask(client(self.tracking_uri), wanted)  # says what is wrong
        else:
            found = self._version("name = ? OR run_id = ?", (wanted, wanted), latest)
        if not found:
            raise not_registered(wanted, self.tracking_uri, self._registered(match["name"] if match else wanted))
        return found

    def _registered(self, name: str | None) -> Registered:
        """What is registered, with the versions of one model."""
        names = [row[0] for row in self._rows("SELECT name FROM registered_models", ())]
        if name not in names:
            return Registered(names)
        listed = f"SELECT version FROM model_versions WHERE {_LIVE} AND name = ?"
        aliases = dict(self._rows("SELECT alias, version FROM registered_model_aliases WHERE name = ?", (name,)))
        return Registered([str(name)], [int(row[0]) for row in self._rows(listed, (name,))], aliases)

    def _version(self, condition: str, values: Sequence[Any], order: str = "") -> KnownVersion | None:
        columns = "name, version, source, run_id, storage_location"
        where = f"{_LIVE} AND ({condition})"
        rows = self._rows(f"SELECT {columns} FROM model_versions WHERE {where} {order}", values)
        if not rows:
            return None
        name, version, source, run_id, location = rows[0]
        of_version = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"
        tags = dict(self._rows(of_version, (name, version)))
        model = (str(source).removeprefix("models:/"),)
        of_model = dict(self._rows("SELECT tag_key, tag_value FROM logged_model_tags WHERE model_id = ?", model))
        params = dict(self._rows("SELECT param_key, param_value FROM logged_model_params WHERE model_id = ?", model))
        files = tags.get(FILES_TAG) or of_model.get(FILES_TAG)
        return KnownVersion(name, str(version), source, run_id or "", files, _folder(location), params)

    def _rows(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        return self.database.execute(query, values).fetchall()


def _folder(location: str | None) -> Path | None:
    """The folder that a file address means."""
    parts = urlsplit(location or "")
    folder = Path(unquote(parts.path))
    return folder if parts.scheme == "file" and folder.is_dir() else None


def _ask(mlflow: MlflowClient, wanted: str | None) -> KnownVersion:
    """The same by MLflow's client."""
    if wanted is not None and wanted.startswith("models:"):
        return _known(mlflow, find_version(mlflow, wanted, "--model", ""))
    if wanted is None:
        names = [model.name for model in mlflow.search_registered_models(f"name LIKE '{MODEL_PREFIX}%'")]
        conditions = [f"name = {quoted(name)}" for name in names]
    else:
        conditions = [f"name = {quoted(wanted)}", f"run_id = {quoted(wanted)}"]
    versions = [version for condition in conditions for version in mlflow.search_model_versions(condition)]
    if not versions:
        raise not_registered(wanted, str(mlflow.tracking_uri), ask_registered(mlflow, wanted))
    return _known(mlflow, max(versions, key=lambda version: int(version.creation_timestamp)))


def _known(mlflow: MlflowClient, version: ModelVersion) -> KnownVersion:
    source, params = str(version.source), {}
    if source.startswith(LOGGED):
        params = dict(mlflow.get_logged_model(source.removeprefix("models:/")).params)
    files = file_hashes(mlflow, version)
    return KnownVersion(version.name, str(version.version), source, version.run_id or "", files, None, params)
