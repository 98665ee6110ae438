"""A proxy before a server that passes requests on and loses answers, as a server does that dies after its work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


class LosesAnswers(ThreadingHTTPServer):
    """Loses the first answer to a POST to each of some paths.

    Attributes:
        paths: ends of these paths; one whose answer was lost is removed.
        asked: the paths of all POSTs.
    """

    daemon_threads = True

    def __init__(self, server: str, paths: set[str]):
        self.server, self.paths = server, paths
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def losing_answers(server: str, *paths: str) -> Iterator[LosesAnswers]:
    """A running proxy before ``server``."""
    proxy = LosesAnswers(server, set(paths))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: LosesAnswers

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        request = Request(self.server.server + self.path, body, headers, method=self.command)
        try:
            with urlopen(request, timeout=60) as answer:
                status, content = answer.status, answer.read()
        except HTTPError as error:
            status, content = error.code, error.read()
        if self.command == "POST":
            self.server.asked.append(self.path)
            lost = {path for path in self.server.paths if self.path.endswith(path)}
            if lost:
                self.server.paths -= lost
                self.close_connection = True
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, format: str, *args: Any) -> None:
        return
