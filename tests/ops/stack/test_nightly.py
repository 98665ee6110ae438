"""The switch of the nights: what it says without a server. With one it is in tests/flows/test_deployments.py."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from made_up import free_ports

from ops.stack.nightly import main


@pytest.mark.parametrize("arguments", [["maybe"], ["on", "off"]])
def test_other_words_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence with what to do."""
    (port,) = free_ports(1)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    assert main(["on"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Prefect at http://127.0.0.1:{port}/api does not answer (")
    assert line.endswith("start `make up`, or set PREFECT_API_URL to its address")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "has no deployment finetune/nightly: `make deploy` creates it"),
        (401, "requires a password: source client.env of `make up`"),
        (500, "answers HTTP 500"),
    ],
)
def test_what_the_server_refuses(
    status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    try:
        assert main([]) == 1
    finally:
        server.shutdown()
        server.server_close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(said)
