"""``python -m ops.stack.host_check start``: Prefect's server, which refuses requests with a foreign Host header.

A page of the name ``evil.example`` can let that name resolve to 127.0.0.1 (DNS rebinding). The browser then takes
this server for that page's own origin, so CORS does not protect it, but it still sends ``Host: evil.example``.
Prefect 3.8.8 does not look at the header and has no setting for it. MLflow's server has such a check itself.

Allowed are ``localhost``, addresses of the loopback and of private networks, the address that the server listens on
(PREFECT_SERVER_API_HOST), the name of this machine, and the names in FINETUNE_ALLOWED_HOSTS, separated by commas. A
browser does not send an address as Host unless the user typed it, and a page cannot register a name without a dot.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterable
from ipaddress import ip_address
from typing import TYPE_CHECKING

from ops.stack.busy import App, Receive, RetryWhenBusy, Scope, Send

if TYPE_CHECKING:
    from fastapi import FastAPI

SETTING = "FINETUNE_ALLOWED_HOSTS"
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]+)?")


class HostCheck:
    """ASGI middleware: a request, or a web socket, whose Host header is not allowed is answered 403.

    Args:
        app: the application behind it.
        names: host names and addresses that are allowed in addition to localhost and private addresses.
    """

    def __init__(self, app: App, names: Iterable[str]):
        self.app = app
        self.names = {name.strip().lower() for name in names if name.strip()} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) == 1 and self.allows(hosts[0]):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":  # closed before it is accepted, which the server answers with 403
            return await send({"type": "websocket.close", "code": 1008})
        shown = ascii(", ".join(hosts)[:100])
        text = f"The Host header {shown} is not a name of this server. Names can be added to {SETTING}.\n"
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def allows(self, host: str) -> bool:
        """Whether a Host header, with or without a port, names this server."""
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = match["name"].strip("[]").lower()
        if name in self.names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return (address.is_loopback or address.is_private) and not address.is_unspecified


def allowed_names() -> list[str]:
    """The names that the environment and this machine add to localhost and private addresses."""
    named = os.environ.get(SETTING, "").split(",")
    return [*named, os.environ.get("PREFECT_SERVER_API_HOST", ""), socket.gethostname()]


def create_app() -> FastAPI:
    """Prefect's application behind the check: a factory for uvicorn."""
    import prefect.server.api.server as server

    return _checked(server.create_app())


def _checked(app: FastAPI) -> FastAPI:
    app.add_middleware(RetryWhenBusy)
    app.add_middleware(HostCheck, names=allowed_names())  # the last one comes first
    return app


def main(arguments: list[str]) -> None:
    """``prefect server`` with these arguments, behind the check.

    The command imports ``create_app`` from its module when it starts (seen in 3.8.8), so the name is replaced there.
    """
    import prefect.server.api.server as server
    from prefect.cli import app

    make = server.create_app
    server.create_app = lambda *given, **options: _checked(make(*given, **options))
    sys.argv = ["prefect", "server", *arguments]
    app()


if __name__ == "__main__":
    main(sys.argv[1:])
