"""A flow run without servers: Prefect's temporary server and MLflow on sqlite, both in the data root."""

from __future__ import annotations

import atexit
import os
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from flows.databases import open_mlflow
from model.net.tokenizer import import_ahead
from ops.databases import check_database
from ops.imports import import_quickly
from ops.machine.lock import exclusive
from ops.machine.process import end_processes, identify_process, left_behind
from ops.servers import TEMPORARY_SERVER_VARIABLE
from ops.settings import Settings
from ops.stack.temporary_server import start_temporary_server

_SERVER_SECONDS = 120.0  # a fresh database takes 23 s on two cores
_IDLE_SECONDS = 0.2  # of waiting for it, after which there is time to import what is needed later
RUN = "FINETUNE_RUN"  # environment variable: names the run that started a process, so that the next can end strays
_SERVERS = (
    "PREFECT_API_URL",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_PROFILE",
    "MLFLOW_TRACKING_URI",
)


def embed(settings: Settings) -> None:
    """Point this process at Prefect's temporary server and at MLflow on sqlite, both in the data root.

    Servers that the user's environment names are ignored on purpose.
    """
    for name in _SERVERS:
        os.environ.pop(name, None)
    home = settings.data_root / "prefect"
    home.mkdir(parents=True, exist_ok=True)  # the server does not make it, and then cannot open its database
    os.environ.update(
        PREFECT_HOME=str(home),
        PREFECT_PROFILES_PATH=str(home / "profiles.toml"),
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false",  # start() starts one
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_UI_URL="",  # it has no pages: no links to them
    )


def start(settings: Settings, weights_dir: str | None = None) -> None:
    """Start Prefect's temporary server, and meanwhile do what the flow needs.

    That is to import its modules, to open MLflow's database, and to read and hash the weights.

    To be called before Prefect is imported, because Prefect reads its settings then.

    A lock admits one process at a time: Prefect and MLflow both fail if two processes create one sqlite database.

    Args:
        settings: of this process.
        weights_dir: the parameter.

    Raises:
        DatabaseError, UsageError: a database cannot be used.
        RuntimeError: the server does not start.
    """
    with exclusive(settings.locks, "databases", "make run", print):
        for orphan in end_processes(lambda: left_behind(RUN), 5):
            print(f"ended what a killed run had left: {orphan}")
        check_database(settings.data_root / "prefect" / "prefect.db", "Prefect")
        check_database(settings.data_root / "mlflow" / "mlflow.db", "MLflow")
        os.environ[RUN] = identify_process().to_json()
        server = start_temporary_server()
        atexit.register(server.stop)  # before Prefect's own handlers are registered, so that it runs after them
        os.environ |= {"PREFECT_API_URL": server.url, TEMPORARY_SERVER_VARIABLE: server.url}
        _import_flow()
        if weights_dir:
            from model.net.loading import hash_ahead  # here: it imports torch

            hash_ahead(Path(weights_dir).expanduser())
        open_mlflow(settings.tracking_uri)
        idle = threading.Timer(_IDLE_SECONDS, _import_later_modules)
        idle.daemon = True
        idle.start()
        try:
            server.wait(_SERVER_SECONDS)
        finally:
            idle.cancel()


def _import_later_modules() -> None:
    """Import what a run needs later, while it has nothing to do."""
    import_ahead().join()
    import torch

    if torch.cuda.is_available():
        with suppress(ImportError):  # not on every system; then the engine does without
            import_module("triton")


def _import_flow() -> None:
    """Import what a flow run needs until its first step, while the server starts on another core."""
    import_quickly("flows.finetune")
