"""Prefect's temporary server, which `make run` uses: a process in a session of its own, behind a check of the Host.

Where PREFECT_API_URL is not set, Prefect's client starts such a server by itself (seen in 3.8.8). This module does it
instead, for two reasons. The client first imports the code of the server, which takes seconds; here the server starts
before anything else is imported. And the client leaves the server in the process group of the terminal, where Ctrl-C
would end it before the flow run's last state is stored; the client would then retry for two minutes. For the same
reason the server ignores SIGTERM as long as its parent lives: Slurm, systemd and others send it to all processes of a
job, whatever their session.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from types import FrameType

from ops.settings import PROJECT_ROOT
from ops.stack.busy import App, Receive, Scope, Send

_APP = "ops.stack.temporary_server:create_app"
_ENVIRONMENT = {
    # As Prefect sets them for the server that its client starts: no pages, and only the services that a run needs.
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    # A fresh database is not filled with Prefect's types of blocks, which takes a second.
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "0",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "0",
}
_STOP_SECONDS = 5.0  # from SIGINT to SIGKILL


class TemporaryServer:
    """A server that was started and may not answer yet.

    Attributes:
        port: on the loopback.
        process: of the server.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes]):
        self.port = port
        self.process = process

    @property
    def url(self) -> str:
        """For PREFECT_API_URL."""
        return f"http://127.0.0.1:{self.port}/api"

    def wait(self, seconds: float) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended, or does not answer in time.
        """
        trouble = "Prefect's temporary server does not start: "
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", "/api/health")
            status = connection.getresponse().status
        except TimeoutError as error:
            raise RuntimeError(f"{trouble}no answer in {seconds:g} s") from error
        except (OSError, HTTPException) as error:  # the socket was closed: the server is ending, or has ended
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
            raise RuntimeError(f"{trouble}it ended with exit code {self.process.returncode}") from error
        finally:
            connection.close()
        if status != 200:
            raise RuntimeError(f"{trouble}it answers with status {status}")

    def stop(self) -> None:
        """End the server; once it has ended, nothing happens."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_temporary_server() -> TemporaryServer:
    """Start the server on a free port of the loopback, with this process's environment."""
    # The socket listens before the server runs: no other process can take the port, and early requests wait in it.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listens = listener.fileno()
        command = [
            sys.executable, "-m", "uvicorn", "--factory", _APP, "--app-dir", str(PROJECT_ROOT), "--fd", str(listens),
            "--lifespan", "on", "--log-level", "error",
        ]  # fmt: skip
        environment = os.environ | _ENVIRONMENT
        process = subprocess.Popen(command, env=environment, pass_fds=[listens], start_new_session=True)
        return TemporaryServer(listener.getsockname()[1], process)


def outlive_sigterm() -> None:
    """Ignore SIGTERM in this process, until its parent has died. To be called after uvicorn has set its handler."""
    parent, handle = os.getppid(), signal.getsignal(signal.SIGTERM)

    def end_if_orphaned(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent and callable(handle):
            handle(number, frame)

    signal.signal(signal.SIGTERM, end_if_orphaned)


def create_app() -> App:
    """The application that uvicorn serves: Prefect's own, behind the check of the Host header."""
    ended = threading.Event()
    # The first handler to be registered runs last. Taking down all modules takes a second, for which a user waits.
    atexit.register(lambda: os._exit(0) if ended.is_set() else None)
    outlive_sigterm()
    from ops.stack.host_check import create_app as create_checked

    checked = create_checked()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await checked(scope, receive, send)
        if scope["type"] == "lifespan":  # raises if it could not start
            ended.set()

    return app
