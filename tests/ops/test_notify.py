"""Notices: their content, and that a faulty webhook neither delays a run nor gets its address logged."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from prefect.settings import PREFECT_UI_URL, temporary_settings

from ops import notify as module
from ops.notify import notify

SECRET = "T0K3N-of-the-hook"


class Hook(HTTPServer):
    """A webhook that keeps the messages it was sent.

    Attributes:
        status: the HTTP status of its answer; None: it never completes one.
        received: the messages.
        types: their content types.
    """

    def __init__(self) -> None:
        self.status: int | None = 200
        self.received: list[dict[str, Any]] = []
        self.types: list[str | None] = []
        self.stop = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.types.append(self.headers["Content-Type"])
        if self.server.status is None:
            # A byte every 0.5 s, so that no single read times out.
            while not self.server.stop.wait(0.5):
                self.wfile.write(b"H")
            return
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("FINETUNE_WEBHOOK_URL", server.url)
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of artifacts that would be written; tests/faults writes real ones."""
    written: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "_write_artifact", lambda *arguments: written.append(arguments))
    return written


def test_the_message_is_slack_s(hook: Hook, artifacts: list[tuple[Any, ...]]) -> None:
    """One field, links in Slack's syntax, and special characters escaped, so that no line is read as a link."""
    assert notify("run <@here> failed", ["loss & more", "x < y"], {"Prefect run": "http://127.0.0.1/1"})
    assert hook.received == [
        {"text": "*run &lt;@here&gt; failed*\nloss &amp; more\nx &lt; y\n<http://127.0.0.1/1|Prefect run>"}
    ]
    assert hook.types == ["application/json"]
    assert len(artifacts) == 1


def test_the_run_s_page_is_linked(hook: Hook, artifacts: list[tuple[Any, ...]]) -> None:
    """Ahead of the other links."""
    run = "0b7c6f5e-8a5d-4a39-9d6c-1f1f6f5d3c11"
    with temporary_settings({PREFECT_UI_URL: "http://127.0.0.1:4200"}):
        notify("crashed", [], {"MLflow run": "http://127.0.0.1/2"}, run)
    pages = f"<http://127.0.0.1:4200/runs/flow-run/{run}|Prefect run>\n<http://127.0.0.1/2|MLflow run>"
    assert hook.received == [{"text": f"*crashed*\n{pages}"}]


def test_without_a_webhook_the_artifact_is_written(
    monkeypatch: pytest.MonkeyPatch, artifacts: list[tuple[Any, ...]]
) -> None:
    """Without the setting nothing is posted, and no warning is logged."""
    monkeypatch.delenv("FINETUNE_WEBHOOK_URL", raising=False)
    assert not notify("a title", ["a line"])
    assert [written[:2] for written in artifacts] == [("a title", ["a line"])]


@pytest.mark.parametrize("fault", ["down", "500", "hangs", "no URL"])
def test_a_bad_webhook_is_a_warning(
    hook: Hook,
    artifacts: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """The call returns within about five seconds, logs it, writes the artifact, and never logs the address."""
    caplog.set_level(logging.DEBUG)
    if fault == "down":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        monkeypatch.setenv("FINETUNE_WEBHOOK_URL", f"http://127.0.0.1:{port}/{SECRET}")
    elif fault == "500":
        hook.status = 500
    elif fault == "hangs":
        hook.status = None
    else:
        monkeypatch.setenv("FINETUNE_WEBHOOK_URL", SECRET)
    started = time.monotonic()
    assert not notify("a title", [], {})
    assert time.monotonic() - started < 6.5
    assert "webhook" in caplog.text
    assert SECRET not in caplog.text
    assert len(artifacts) == 1


def test_a_hanging_prefect_does_not_keep_the_webhook_waiting(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are sent at the same time, with one time limit."""
    monkeypatch.setattr(module, "_write_artifact", lambda *arguments: time.sleep(30))
    started = time.monotonic()
    assert notify("a title", [], {})
    assert time.monotonic() - started < 6.5
    assert len(hook.received) == 1


def test_a_long_text_is_cut(hook: Hook, artifacts: list[tuple[Any, ...]]) -> None:
    """Slack would refuse the whole text; the links are kept."""
    assert notify("a title", ["x" * 10_000], {"run": "http://127.0.0.1/1"})
    (message,) = hook.received
    assert len(message["text"]) < 3_100
    assert message["text"].endswith("<http://127.0.0.1/1|run>")


def test_apprise_gets_the_notice(
    hook: Hook, artifacts: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the webhook, and alone; several addresses; the links are in the text."""
    address = hook.url.replace("http://", "json://")
    monkeypatch.setenv("FINETUNE_NOTIFY", f"{address}1, {address}2")
    assert notify("finetune/355m failed: a run", ["out of memory"], {"MLflow run": "http://mlflow/run"})
    assert len(hook.received) == 3
    sent = [message for message in hook.received if "message" in message]
    assert {message["title"] for message in sent} == {"finetune/355m failed: a run"}
    assert {message["message"] for message in sent} == {"out of memory\nMLflow run: http://mlflow/run"}
    monkeypatch.delenv("FINETUNE_WEBHOOK_URL")
    assert notify("a title alone")
    assert len(hook.received) == 5
    assert hook.received[-1]["message"] == "a title alone"


@pytest.mark.parametrize(
    ("status", "suffix", "told"),
    [
        (500, "", "a receiver refused the notice, or did not answer"),
        (200, " nosuchservice", "an address is none that apprise knows"),
        (None, "", "was given up after"),
    ],
)
def test_a_faulty_receiver_delays_nothing_and_is_not_named(
    hook: Hook,
    artifacts: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int | None,
    suffix: str,
    told: str,
) -> None:
    """Its address, which is a secret, is in no log."""
    monkeypatch.setattr(module, "_SECONDS", 2.0)
    monkeypatch.setenv("FINETUNE_NOTIFY", hook.url.replace("http://", "json://") + suffix)
    monkeypatch.delenv("FINETUNE_WEBHOOK_URL")
    hook.status = status
    caplog.set_level(logging.DEBUG)
    begun = time.monotonic()
    assert not notify("a title", [f"the address is {hook.url.replace('http://', 'json://')}"])
    assert time.monotonic() - begun < 4
    assert "FINETUNE_NOTIFY" in caplog.text
    assert told in caplog.text
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("urllib3")]
    assert SECRET not in "".join(ours)
