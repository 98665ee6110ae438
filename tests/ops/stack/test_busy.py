"""Requests that meet a busy database: with a made-up application, and with a real Prefect server under load."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from ops.stack import busy
from ops.stack.busy import Receive, RetryWhenBusy, Scope, Send
from ops.stack.temporary_server import start_temporary_server


class Application:
    """Answers with the given statuses in turn, and with the body it was sent; like Prefect's, it raises after 503."""

    def __init__(self, *statuses: int):
        self.statuses = list(statuses)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["seen"] = True  # as routers do; a repeated request begins with a scope of its own
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(body)
        status = self.statuses.pop(0)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})
        if status >= 500:
            raise RuntimeError(f"status {status}")
        assert (await receive())["type"] == "http.disconnect"


def request(application: Application) -> list[Scope]:
    """What the client is sent for a request whose body comes in two messages."""
    parts = [
        {"type": "http.request", "body": b"one ", "more_body": True},
        {"type": "http.request", "body": b"two", "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Scope] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Scope) -> None:
        sent.append(message)

    asyncio.run(RetryWhenBusy(application)({"type": "http"}, receive, send))
    return sent


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("refusals", [0, 1, 2])
def test_the_client_sees_the_answer_alone(refusals: int) -> None:
    """The whole body comes with each attempt."""
    application = Application(*[503] * refusals, 201)
    start, body = request(application)
    assert (start["status"], body["body"]) == (201, b"one two")
    assert application.bodies == [b"one two"] * (refusals + 1)


def test_a_database_that_stays_busy_is_answered_in_the_end() -> None:
    application = Application(503, 503, 503)
    with pytest.raises(RuntimeError, match="status 503"):
        request(application)
    assert application.statuses == []


def test_other_answers_and_errors_are_not_repeated() -> None:
    application = Application(500, 200)
    with pytest.raises(RuntimeError, match="status 500"):
        request(application)
    assert len(application.bodies) == 1
    application = Application(409, 200)
    assert request(application)[0]["status"] == 409


@pytest.mark.slow
def test_a_real_server_under_load_turns_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients take slots of a limit, and two create flow runs. Without the module some of them get 503."""
    monkeypatch.undo()
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    server = start_temporary_server()
    try:
        server.wait(120)
        _post(server.port, [("/api/v2/concurrency_limits/", {"name": "tag:gpu", "limit": 1000})])
        [(_, flow)] = _post(server.port, [("/api/flows/", {"name": "finetune"})])
        slot = "/api/v2/concurrency_limits/increment-with-lease", {"names": ["tag:gpu"], "slots": 1}
        run = "/api/flow_runs/", {"flow_id": flow["id"], "state": {"type": "PENDING"}}
        with ThreadPoolExecutor() as pool:
            answers = [*pool.map(lambda one: _post(server.port, [one] * 25), (slot, run, slot, run))]
    finally:
        server.stop()
    assert Counter(status for part in answers for status, _ in part) == {200: 50, 201: 50}


def _post(port: int, requests: list[tuple[str, dict[str, Any]]]) -> list[tuple[int, Any]]:
    """Status and content of each answer; one connection for all."""
    found = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        for path, content in requests:
            connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found.append((answer.status, json.loads(answer.read())))
    return found
