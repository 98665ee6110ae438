"""A flow run without servers: Prefect's temporary server and MLflow on sqlite, both in the data root."""

from __future__ import annotations

import gc
import os
import signal
import sys

from flows.databases import open_mlflow
from ops.databases import check_database
from ops.machine.lock import exclusive
from ops.machine.process import end_processes, identify_process, left_behind
from ops.settings import Settings
from ops.stack.temporary_server import detach_temporary_server
from ops.threads import in_daemon_thread

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
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="true",
        # A fresh database takes 23 s on two cores; the default limit is 20.
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
    )


def start(settings: Settings) -> None:
    """Start Prefect's temporary server, and import what the flow needs while the server starts.

    A lock admits one process at a time: Prefect and MLflow both fail if two processes create one sqlite database.

    Raises:
        DatabaseError, UsageError: a database cannot be used.
    """
    # Imports create objects that live to the end: collecting them takes a quarter of the import time.
    gc.disable()
    detach_temporary_server()
    from prefect.client.orchestration import get_client

    with exclusive(settings.locks, "databases", "make run", print):
        for orphan in end_processes(lambda: left_behind(RUN), 5):
            print(f"ended what a killed run had left: {orphan}")
        check_database(settings.data_root / "prefect" / "prefect.db", "Prefect")
        check_database(settings.data_root / "mlflow" / "mlflow.db", "MLflow")
        os.environ[RUN] = identify_process().to_json()
        server = in_daemon_thread(lambda: get_client(sync_client=True), "temporary-server")
        import torch._dynamo  # noqa: F401  # torch's optimizers do so at first use
        from transformers import AutoTokenizer  # noqa: F401

        import flows.finetune  # noqa: F401

        open_mlflow(settings.tracking_uri)
        server.result()
    gc.freeze()
    gc.enable()


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP (a closed terminal) run Python's exit handlers, which end the temporary server.

    During a flow run Prefect's handler of SIGTERM comes first, and calls this one when the run is closed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
