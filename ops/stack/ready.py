"""``python -m ops.stack.ready``: wait for the servers of ``make up``, set Prefect up, start the worker."""

from __future__ import annotations

import json
import re
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from xmlrpc.client import Fault

from ops.redaction import redact
from ops.servers import EXPERIMENT, MODEL_TRAINING, USER, Servers
from ops.settings import Settings
from ops.stack.deploy import DeployError, deploy, set_up
from ops.tracking.views import view_url

_STARTS = 2  # of a process that ends at once, before it is given up
SECONDS = 120.0  # time limit for each server; four times what all need together on two idle cores


class NotReadyError(RuntimeError):
    """A server or the worker did not start; the message names it and its log."""


def wait_for(what: str, log: Path, ready: Callable[[], bool], pid: Callable[[], int] = lambda: 0) -> None:
    """Call ``ready`` until it is true; a refused connection counts as not ready yet.

    Args:
        what: name of the server or worker, for the error.
        log: path of its log, for the error.
        pid: the id of its process, 0 while there is none. supervisord starts one that has ended again and again.

    Raises:
        NotReadyError: it was not ready within ``SECONDS``, or its process has ended twice.
    """
    deadline = time.monotonic() + SECONDS
    pids: set[int] = set()
    while time.monotonic() < deadline:
        with suppress(OSError, HTTPException):
            if ready():
                return
        with suppress(OSError, HTTPException, Fault):
            pids.add(pid())
        if len(pids - {0}) > _STARTS:
            raise NotReadyError(f"{what} ends when it starts ({_last_error(log)}): see {log}")
        time.sleep(0.2)
    raise NotReadyError(f"{what} did not start in {SECONDS:.0f} s: see {log}")


def _last_error(log: Path) -> str:
    """The last line of a log that begins with the name of an error, else its last line."""
    lines: list[str] = []
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return redact([*lines, *errors][-1])[:300] if lines else "its log is empty"


def _answers(url: str | Request) -> bool:
    with urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)


def _mlflow_request(servers: Servers, path: str) -> Request:
    """A request to MLflow's REST API, with the credentials of client.env."""
    ask = Request(f"{servers.mlflow_url}/api/2.0/mlflow/{path}")
    if servers.secure:
        ask.add_header("Authorization", "Basic " + b64encode(f"{USER}:{servers.password()}".encode()).decode())
    return ask


def runs_page(servers: Servers) -> str:
    """The address of MLflow's page of runs; of all experiments, if MLflow does not say which one is theirs."""
    try:
        ask = _mlflow_request(servers, f"experiments/get-by-name?experiment_name={EXPERIMENT}")
        with urlopen(ask, timeout=5) as answer:
            return str(view_url(servers.mlflow_url, json.load(answer)["experiment"]["experiment_id"]))
    except (OSError, HTTPException, ValueError, KeyError):
        return f"{servers.mlflow_url}/#/experiments?{MODEL_TRAINING}"


def _prepare_pages(servers: Servers) -> None:
    """Create the experiment in MLflow, so that its page can be opened before the first run."""
    from ops.tracking.connection import client, open_experiment

    try:
        open_experiment(client(servers.mlflow_url), Settings.load())
    except Exception as error:  # a run meets the same trouble, and reports it
        print(f"MLflow's page of runs is not prepared: {redact(str(error))}", file=sys.stderr)


def _takes_the_password(servers: Servers) -> bool:
    """Whether MLflow answers a request with the credentials of client.env.

    Raises:
        NotReadyError: MLflow refuses the password.
    """
    try:
        return _answers(_mlflow_request(servers, "experiments/search?max_results=1"))
    except HTTPError as error:
        if error.code != 401:
            raise
        raise NotReadyError(
            f"MLflow does not know the password in {servers.password_file}: it keeps the one it was first started "
            f"with. Restore that one, or remove {servers.home / 'basic_auth.db'}, and with it all users but {USER}"
        ) from None


def main() -> int:
    """Wait, set up, and start worker and watcher. Returns the exit status."""
    servers = Servers.load()
    began = datetime.now(UTC)

    # Imported here: these imports take seconds, in which the server starts.
    from prefect.client.orchestration import get_client

    from ops.recovery.limits import POOL

    def worker_is_online() -> bool:
        beats = [worker.last_heartbeat_time for worker in client.read_workers_for_work_pool(POOL)]
        return any(beat and beat > began for beat in beats)

    def pid(program: str) -> Callable[[], int]:
        return lambda: int(servers.supervisor().getProcessInfo(program)["pid"])

    health = f"{servers.prefect_url}/api/health"
    try:
        wait_for("Prefect's server", servers.logs / "prefect.log", lambda: _answers(health), pid("prefect"))
        with get_client(sync_client=True) as client:
            set_up(client, servers.gpus)
            servers.supervisor().startProcess("worker", False)
            deploy(client)
            log = servers.logs / "mlflow.log"
            wait_for("MLflow's server", log, lambda: _takes_the_password(servers), pid("mlflow"))
            _prepare_pages(servers)  # while the worker starts
            wait_for("the worker", servers.logs / "worker.log", worker_is_online, pid("worker"))
            servers.supervisor().startProcess("watch", False)  # last: no other program needs it
    except (NotReadyError, DeployError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
