"""The server of `make run`: its session, its socket, and how it starts and ends. Most tests serve a small app."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from made_up import wait_for

from ops.servers import TEMPORARY_SERVER_VARIABLE
from ops.settings import PROJECT_ROOT
from ops.stack import temporary_server
from ops.stack.temporary_server import TemporaryServer, start_temporary_server

APP = """
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await send({"type": "lifespan.startup." + os.environ["ANSWER"]})
    text = os.environ["PREFECT__SERVER_EPHEMERAL"] + os.environ["PREFECT__SERVER_FINAL"]
    await send({"type": "http.response.start", "status": int(os.environ["STATUS"]), "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})
def create_app():
    from ops.stack.temporary_server import outlive_sigterm
    outlive_sigterm()
    return app
"""


@pytest.fixture
def small_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lets the server serve the app above; the test may set ANSWER (complete or failed) and STATUS."""
    (tmp_path / "small_app.py").write_text(APP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ANSWER", "complete")
    monkeypatch.setenv("STATUS", "200")
    monkeypatch.setattr(temporary_server, "_APP", "small_app:create_app")
    return monkeypatch


def ask(server: TemporaryServer, host: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/api/health", headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_it_has_a_session_of_its_own_and_ends(small_app: pytest.MonkeyPatch) -> None:
    """No signal to the group of this process reaches it."""
    server = start_temporary_server()
    try:
        assert os.getsid(server.process.pid) == server.process.pid != os.getsid(0)
        server.wait(60)
        assert ask(server, "localhost") == (200, b"11")
    finally:
        server.stop()
    assert server.process.returncode is not None
    with pytest.raises(ConnectionRefusedError):
        ask(server, "localhost")


def test_a_signal_to_all_processes_of_a_job_does_not_end_it(small_app: pytest.MonkeyPatch) -> None:
    """As Slurm sends it; the run still stores its last state, and ends the server then."""
    server = start_temporary_server()
    try:
        server.wait(60)
        server.process.terminate()
        time.sleep(1)
        assert ask(server, "localhost") == (200, b"11")
        began = time.monotonic()
    finally:
        server.stop()
    assert time.monotonic() - began < 4
    assert server.process.returncode != -signal.SIGKILL


def test_without_its_parent_sigterm_ends_it(small_app: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a killed run left behind ends as any other process."""
    start = "from ops.stack import temporary_server as t; t._APP = 'small_app:create_app'; "
    start += "server = t.start_temporary_server(); server.wait(60); open('pid', 'w').write(str(server.process.pid))"
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(PROJECT_ROOT)])
    subprocess.run([sys.executable, "-c", start], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, timeout=90)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for("its end", lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 10)


def test_a_request_that_comes_too_early_waits(small_app: pytest.MonkeyPatch) -> None:
    """The port is the server's from the beginning, so nobody has to ask twice."""
    server = start_temporary_server()
    try:
        assert ask(server, "localhost") == (200, b"11")
    finally:
        server.stop()


def test_a_server_that_does_not_start_is_an_error(small_app: pytest.MonkeyPatch) -> None:
    """It is said how it ended, and waiting does not outlast it."""
    small_app.setenv("ANSWER", "failed")
    server = start_temporary_server()
    try:
        with pytest.raises(RuntimeError, match="server does not start: it ended with exit code 3"):
            server.wait(600)
    finally:
        server.stop()


def test_a_server_that_answers_with_an_error(small_app: pytest.MonkeyPatch) -> None:
    small_app.setenv("STATUS", "500")
    server = start_temporary_server()
    try:
        with pytest.raises(RuntimeError, match="it answers with status 500"):
            server.wait(60)
    finally:
        server.stop()


def test_it_is_known_to_be_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its address alone: a client of another server in the same process is not taken for one of it."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from ops.recovery.limits import ensure_limit, is_temporary

    monkeypatch.setenv(TEMPORARY_SERVER_VARIABLE, "http://127.0.0.1:8123/api")
    for url, expected in (("http://127.0.0.1:8123/api", True), ("http://127.0.0.1:4200/api", False)):
        with temporary_settings({PREFECT_API_URL: url}):
            assert is_temporary(get_client(sync_client=True)) is expected
    here = SimpleNamespace(server_type=None, api_url="http://127.0.0.1:8123/api/")
    assert not ensure_limit(here, 1)  # type: ignore[arg-type]  # it has no method to create a limit with


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporaryServer]:
    """Prefect's own application, on a fresh database."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        server = start_temporary_server()
    try:
        server.wait(300)
        yield server
    finally:
        server.stop()


@pytest.mark.slow
def test_prefects_application_is_behind_the_check_of_the_host_header(prefect: TemporaryServer) -> None:
    assert ask(prefect, f"127.0.0.1:{prefect.port}") == (200, b"true")
    assert ask(prefect, "evil.example")[0] == 403


@pytest.mark.slow
def test_prefects_application_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not take down its modules at the end; of one that could not start the exit code stays."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    server = start_temporary_server()
    try:
        server.wait(300)
    finally:
        server.stop()
    assert server.process.returncode == 0
    (tmp_path / "prefect.db").write_bytes(b"no database" * 100)
    server = start_temporary_server()
    try:
        with pytest.raises(RuntimeError, match="exit code 3"):
            server.wait(300)
    finally:
        server.stop()
