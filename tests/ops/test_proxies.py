"""The loopback is reached without a proxy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ops.proxies import spare_loopback

ROOT = Path(__file__).resolve().parents[2]
OURS = "localhost,127.0.0.1,::1"
# The clients of Prefect, of MLflow and of this project.
ASK = """
import sys, urllib.request
import ops, httpx, requests
for ask in (httpx.get, requests.get, urllib.request.urlopen):
    ask(sys.argv[1])
    print("answered")
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({"NO_PROXY": "intranet"}, "intranet"),
        ({"HTTP_PROXY": "http://p:1"}, OURS),
        ({"https_proxy": "http://p:1", "NO_PROXY": "intranet, 127.0.0.1"}, "intranet,127.0.0.1,localhost,::1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "a", "no_proxy": "b"}, f"b,{OURS}"),
        ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, "*"),
    ],
)
def test_the_loopback_is_added(before: dict[str, str], after: str | None) -> None:
    """Where a proxy is set; the hosts that were there stay."""
    environment = dict(before)
    spare_loopback(environment)
    assert environment.get("NO_PROXY") == after
    spare_loopback(environment)
    assert environment.get("NO_PROXY") == after
    assert {name for name in environment if "PROXY" in name and name != "NO_PROXY"} <= before.keys()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_clients_reach_a_server_of_this_machine(name: str) -> None:
    """mlflow#11551: with a proxy that does not answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment = {**inherited, name: "http://127.0.0.1:9"}
        command = [sys.executable, "-c", ASK, f"http://127.0.0.1:{server.server_port}/"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.stdout == "answered\n" * 3, done.stderr[-2000:]
