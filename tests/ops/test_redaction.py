"""Secrets in texts, log records, errors and settings are hidden; everything else stays as it is."""

from __future__ import annotations

import base64
import io
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from made_up import MAKE

from ops.notify import notify
from ops.redaction import redact, redact_error, redacted_errors, without_credentials
from ops.settings import Settings
from ops.tracking.connection import client, refusal
from ops.tracking.runs import RunRef

CANARY = "canary-5d41402abc"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings.load() changes these; they are put back after each test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host:5000/path", "http://host:5000/path"),
        ("postgresql+psycopg2://me:p%40w@db/x?a=b@c", "postgresql+psycopg2://db/x?a=b@c"),
        ("http://token@host", "http://host"),
        ("http://me:p@w@host/", "http://host/"),
        ("http://me:@host, and https://a:b@c: refused", "http://host, and https://c: refused"),
        ("url='http://me:pw@host'", "url='http://host'"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host and me@example.org", "http://host and me@example.org"),
        ("models:/gpt2-code-tiny@champion", "models:/gpt2-code-tiny@champion"),
    ],
)
def test_user_and_password_are_removed_from_addresses(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert redact(text) == shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", CANARY),
        ("MLFLOW_TRACKING_PASSWORD", CANARY),
        ("AWS_SECRET_ACCESS_KEY", CANARY),
        ("PREFECT_API_KEY", CANARY),
        ("PREFECT_API_AUTH_STRING", f"admin:{CANARY}"),
        ("FINETUNE_WEBHOOK_URL", f"https://hooks.example/{CANARY}"),
        ("PREFECT_API_DATABASE_CONNECTION_URL", f"postgresql+asyncpg://me:{CANARY}@db/prefect"),
        ("HTTPS_PROXY", f"http://me:{CANARY}@proxy:3128"),
    ],
)
def test_secrets_of_the_environment_are_hidden_wherever_they_stand(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    said = value if name.endswith("WEBHOOK_URL") else f"the password {CANARY} was refused"
    assert CANARY not in redact(said)
    assert "[secret]" in redact(said)


def test_quoted_and_unquoted_forms_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may show the password of an address decoded, and that of a variable encoded."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:can%40ry%2Fpw@host")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "other@secret")
    assert redact("can@ry/pw can%40ry%2Fpw") == "[secret] [secret]"
    assert redact("other%40secret") == "[secret]"


def test_ordinary_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short values and variables that only look similar hide nothing."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sentence")
    monkeypatch.setenv("SOME_TOKEN", "a")
    monkeypatch.setenv("EMPTY_PASSWORD", "")
    assert redact("a sentence, as it is: 100 %") == "a sentence, as it is: 100 %"


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """What a library's logger, with a handler of its own, has written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("some.library")
    log.addHandler(handler)
    yield stream.getvalue
    log.removeHandler(handler)


def test_log_records_are_redacted(logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Message, arguments and traceback with its causes; other records keep their arguments."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    log = logging.getLogger("some.library")
    log.error("no answer from %s with %s", f"http://me:{CANARY}@host/x", {"token": CANARY})
    try:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise ValueError(f"http://me:{CANARY}@host") from error
    except ValueError:
        log.exception("it failed")
    log.error("%d rows", 3)
    text = logged()
    assert CANARY not in text
    assert "no answer from http://host/x" in text
    assert "Traceback" in text
    assert "ValueError: http://host" in text
    assert "3 rows" in text
    record = logging.getLogger().makeRecord("x", logging.INFO, "f", 1, "%d rows", (3,), None)
    assert record.args == (3,)


def test_errors_are_redacted_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the errors that led to them, and MLflow's own attribute; type and error code stay."""
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("HF_TOKEN", CANARY)

    def fail() -> None:
        try:
            raise OSError(5, f"no route to http://me:pw@host ({CANARY})", f"/home/{CANARY}")
        except OSError as cause:
            raise MlflowException(f"http://me:{CANARY}@host failed", error_code=9) from cause

    with pytest.raises(MlflowException) as caught, redacted_errors():
        fail()
    assert str(caught.value) == caught.value.message == "http://host failed"
    assert CANARY not in str(caught.value.__cause__)
    assert caught.value.__cause__.errno == 5  # type: ignore[union-attr]
    error = ValueError("x")
    error.__context__ = error
    redact_error(error)


def test_the_settings_move_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is then free of it, in this process and in those that it starts."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://m%40e:p%2Fw%40@host:5000/mlflow")
    assert Settings.load().tracking_uri == "https://host:5000/mlflow" == os.environ["MLFLOW_TRACKING_URI"]
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "m@e"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p/w@"


def test_credentials_that_are_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "other")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pw@host")
    assert Settings.load().tracking_uri == "http://host"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "other"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "another"


@pytest.mark.parametrize("uri", ["http://host:5000", "http://user@host", "sqlite:////x/a:b@c.db", "databricks"])
def test_an_address_without_a_password_stays(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Settings.load().tracking_uri == uri
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(401)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        return


def test_mlflow_still_gets_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request carries the user and password of the address, and the error does not."""
    server = HTTPServer(("127.0.0.1", 0), _Server)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:{server.server_port}")
        uri = Settings.load().tracking_uri
        with pytest.raises(Exception, match="401") as caught:
            client(uri).search_experiments(max_results=1)
    finally:
        server.shutdown()
        server.server_close()
    expected = "Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()
    assert set(server.seen) == {expected}  # type: ignore[attr-defined]
    assert CANARY not in str(caught.value)


def test_messages_and_links_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tracking server, and of a database that is used without one."""
    for uri in (f"http://me:{CANARY}@host:5000", f"postgresql://me:{CANARY}@db/mlflow"):
        run = RunRef(uri, "1", "abc")
        said = refusal(uri, ValueError(f"API request to {uri}/api failed"))
        assert CANARY not in f"{run.url} {run.link} {said}"
        assert "host:5000" in said or "db/mlflow" in said


def test_an_unknown_tracking_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow repeats the whole address in its error."""
    with pytest.raises(Exception, match="foo://") as caught:
        client(f"foo://me:{CANARY}@host/x")
    assert CANARY not in str(caught.value)


def test_notices_are_redacted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """They are posted to a chat."""
    posted: list[tuple[Any, ...]] = []
    monkeypatch.setattr("ops.notify._post", lambda *given: posted.append(given) or True)
    monkeypatch.setattr("ops.notify._write_artifact", lambda *given: posted.append(given))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    notify(f"failed with {CANARY}", [f"http://me:{CANARY}@host"], {"page": f"http://me:{CANARY}@host/run"})
    assert len(posted) == 2
    assert CANARY not in f"{posted} {caplog.text}"


@pytest.mark.slow
def test_the_doctor_names_servers_without_passwords() -> None:
    """Of both servers, neither of which answers."""
    servers = {
        "PREFECT_API_URL": f"http://me:{CANARY}@127.0.0.1:9/api",
        "MLFLOW_TRACKING_URI": f"http://me:{CANARY}@127.0.0.1:9",
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    command = [*MAKE, "doctor", "ARGS="]  # not those of make test
    done = subprocess.run(command, env=os.environ | servers, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert "no Prefect server answers at http://127.0.0.1:9/api" in said
    assert "MLflow at http://127.0.0.1:9 does not answer" in said
    assert CANARY not in said


@pytest.mark.parametrize("target", ["worker", "watch", "deploy"])
def test_a_password_in_prefects_address_is_refused(target: str) -> None:
    """Prefect's own command line would log it; the refusal names the setting for it and not the password."""
    servers = {"PREFECT_API_URL": f"http://me:{CANARY}@127.0.0.1:9/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run([*MAKE, target], env=os.environ | servers, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "PREFECT_API_AUTH_STRING" in done.stdout + done.stderr
    assert CANARY not in done.stdout + done.stderr
