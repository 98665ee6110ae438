"""Access to MLflow: a client of a server or a database, its experiment, and what to say when it refuses."""

from __future__ import annotations

import errno
import logging
import shlex
import socket
from functools import cache
from typing import TYPE_CHECKING

from ops.databases import MLFLOW, is_absent, look_at, sqlite_path, unusable
from ops.redaction import redact, redacted_errors, without_credentials
from ops.servers import EXPERIMENT
from ops.settings import Settings
from ops.text import one_line
from ops.tracking.views import provide_view, server_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror)
_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH)


def refusal(tracking_uri: str, error: Exception) -> str:
    """An error message: MLflow refused a request, or did not answer."""
    reason = f"refuses (MLFLOW_TRACKING_URI names it): {one_line(error)}"
    cause: BaseException | None = error
    while cause:  # beneath the errors of requests and urllib3, which name the request
        if isinstance(cause, _NO_ANSWER) or (isinstance(cause, OSError) and cause.errno in _NO_ROUTE):
            said = cause.strerror or one_line(cause)
            reason = f"does not answer ({said}): start it, or set MLFLOW_TRACKING_URI to its address"
        cause = cause.__cause__ or cause.__context__
    return redact(f"MLflow at {tracking_uri} {reason}")


def require_runs(tracking_uri: str) -> None:
    """Refuse a database of `make run` that does not exist yet: MLflow would take seconds to make an empty one.

    Raises:
        LookupError: no run has made it.
    """
    if is_absent(tracking_uri):
        raise LookupError(
            f"there is no run yet, {tracking_uri} does not exist: run `make run` first, or set MLFLOW_TRACKING_URI "
            "to the server of your runs"
        )


def client(tracking_uri: str) -> MlflowClient:
    """A client of the tracking server and its model registry.

    Raises:
        DatabaseError: the address is that of a database, which cannot be used.
    """
    if "://" in tracking_uri and not server_of(tracking_uri):
        _look_once(tracking_uri)
    import mlflow
    from mlflow import MlflowClient

    # MLflow's migrations announce themselves at INFO, a hundred lines on a fresh sqlite file.
    for name in ("alembic", "mlflow.store.db.utils"):
        logger = logging.getLogger(name)
        if logger.level != logging.WARNING:  # setLevel goes through all loggers that there are
            logger.setLevel(logging.WARNING)
    if path := sqlite_path(tracking_uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    # The registry resolves models:/ URIs with the process-wide URI, whatever the client was given.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    try:
        with redacted_errors():
            return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    except Exception as error:  # MLflow, SQLAlchemy and alembic raise different ones
        raise unusable(tracking_uri, MLFLOW, error) from error


@cache
def _look_once(tracking_uri: str) -> None:
    """Look at a database before MLflow opens it; once is enough for a process."""
    look_at(tracking_uri, MLFLOW)


def import_store(tracking_uri: str) -> None:
    """Import what ``client`` and its first request would, which takes seconds. Nothing is opened."""
    import mlflow

    if not tracking_uri.startswith("http"):
        import mlflow.store.tracking.sqlalchemy_workspace_store  # noqa: F401


def find_experiment(mlflow: MlflowClient) -> Experiment | None:
    """The experiment of all runs; None if there is none yet.

    Raises:
        RuntimeError: it was deleted in MLflow, and its runs with it.
    """
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is not None and found.lifecycle_stage != "active":
        uri = without_credentials(mlflow.tracking_uri)
        raise RuntimeError(
            f"the experiment {EXPERIMENT} of MLflow at {uri} was deleted, and new runs cannot be added: restore it "
            f"with `MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore -x {found.experiment_id}`"
        )
    return found


def open_experiment(mlflow: MlflowClient, settings: Settings) -> str:
    """The id of the experiment of all runs, with its description and its view; it is created if there is none.

    Raises:
        RuntimeError: as ``find_experiment``.
    """
    experiment_id = _experiment_id(mlflow, settings)
    provide_view(mlflow, experiment_id, mlflow.get_experiment(experiment_id).tags)
    return experiment_id


def _experiment_id(mlflow: MlflowClient, settings: Settings) -> str:
    from mlflow.exceptions import MlflowException

    found = find_experiment(mlflow)
    if found is None:
        # A server keeps artifacts where it is told to; on sqlite the default would be ./mlruns of the cwd.
        local = not settings.tracking_uri.startswith("http")
        try:
            return mlflow.create_experiment(
                EXPERIMENT,
                settings.artifacts.as_uri() if local else None,
                {"mlflow.experimentKind": "custom_model_development"},
            )
        except MlflowException:  # another run was faster
            found = find_experiment(mlflow)
            if found is None:
                raise
    return str(found.experiment_id)
