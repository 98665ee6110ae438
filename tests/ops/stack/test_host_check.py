"""The check of the Host header: with a real uvicorn, and in front of a real Prefect server."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from made_up import FOREIGN, ROOT, free_ports, wait_for

from ops.stack.busy import Receive, Scope, Send
from ops.stack.host_check import HostCheck, allowed_names

_ALLOWED = """
127.0.0.1 127.0.0.1:4200 127.9.9.9 localhost localhost:80 LOCALHOST [::1] [::1]:4200 10.1.2.3:4200
172.16.0.1 192.168.1.10 gpubox gpubox:4200 GPUBOX proxy.example [fd00::1]:4200
"""
_REFUSED = """
evil.example evil.example:4200 localhost.evil.example 127.0.0.1.evil.example evil.localhost 8.8.8.8
[2001:4860:4860::8888] 0.0.0.0 [::] 2130706433 0x7f.1 127.1 localhost@evil.example
evil.example@localhost localhost:80:80 localhost: localhost:x [::1 ::1 [localhost]
gpubox.evil.example proxy.example.evil localhost,evil.example
"""


@pytest.mark.parametrize("host", _ALLOWED.split())
def test_names_of_this_server(host: str) -> None:
    assert HostCheck(_never, ["gpubox", " Proxy.example ", ""]).allows(host)


@pytest.mark.parametrize("host", [*_REFUSED.split(), "", " ", "localhost evil.example", "local\xadhost"])
def test_foreign_names(host: str) -> None:
    assert not HostCheck(_never, ["gpubox", " Proxy.example ", ""]).allows(host)


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the application was reached")


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"evil.example"], [b"localhost", b"localhost"]])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_no_host_or_two_are_refused(kind: str, hosts: list[bytes]) -> None:
    """HTTP/1.0 has requests without one; with two it is unclear which one counts."""
    sent: list[Scope] = []

    async def send(message: Scope) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [(b"host", host) for host in hosts]}
    asyncio.run(HostCheck(_never, [])(scope, None, send))  # type: ignore[arg-type]
    assert sent[0].get("status") == 403 or sent[0]["type"] == "websocket.close"


def test_names_come_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALLOWED_HOSTS", "proxy.example,other.example")
    monkeypatch.setenv("PREFECT_SERVER_API_HOST", "198.41.0.4")
    check = HostCheck(_never, allowed_names())
    for host in ("proxy.example", "other.example:443", "198.41.0.4:4200", socket.gethostname()):
        assert check.allows(host)
    assert not check.allows("third.example")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Prefect server started as `make up` starts it."""
    home = tmp_path_factory.mktemp("prefect")
    (free,) = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(free),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    with Path(home / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "ops.stack.host_check", "start"],
            cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for("Prefect's server", lambda: _ask(free, "localhost")[0] == 200, 90)
        yield free
    finally:
        server.terminate()
        server.wait(timeout=30)


def _ask(port: int, host: str, path: str = "/api/health", **headers: str) -> tuple[int, str]:
    """Status and text of an answer to a GET request."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path, headers={"Host": host, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


def test_prefects_server_refuses_foreign_hosts(port: int) -> None:
    """Interface and pages alike; the answer names the setting."""
    for path in ("/api/health", "/api/admin/settings", "/", "/docs"):
        status, text = _ask(port, "evil.example", path)
        assert status == 403
        assert "FINETUNE_ALLOWED_HOSTS" in text


def test_prefects_server_answers_to_its_own_names(port: int) -> None:
    for host in ("127.0.0.1", "localhost", f"localhost:{port}", socket.gethostname()):
        assert _ask(port, host)[0] == 200
        status, page = _ask(port, host, "/")
        assert status == 200
        assert "<html" in page.lower()


def test_web_sockets_are_checked_too(port: int) -> None:
    """Prefect's events and logs come through them; a browser applies no CORS to them."""
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Protocol": "prefect",
    }  # fmt: skip
    assert _ask(port, "evil.example", "/api/events/out", **upgrade)[0] == 403
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", "/api/events/out", headers={"Host": "localhost", **upgrade})
        assert connection.getresponse().status == 101
