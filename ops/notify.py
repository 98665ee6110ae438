"""Short notices to a chat's webhook and to Prefect's artifacts; neither can hold a run up or make it fail."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import UUID

from ops.threads import in_daemon_thread

_SECONDS = 5.0  # for both ways together, at most
_TEXT = 3000  # characters; Slack cuts at 4,000
_log = logging.getLogger(__name__)


def notify(
    title: str,
    lines: Sequence[str] = (),
    links: Mapping[str, str | None] | None = None,
    flow_run_id: str | None = None,
) -> bool:
    """Post a notice to FINETUNE_WEBHOOK_URL, if that is set, and write it as Prefect's artifact ``notice``.

    The URL is a secret: it is read from the environment each time, and neither logged nor stored.

    Args:
        title: one line.
        lines: what there is to say, a few short lines.
        links: title to URL, beside that of the Prefect run; None for a page that there is not.
        flow_run_id: the Prefect run it is about; by default the one that calls.

    Returns:
        Whether the webhook took it; False also if there is none.
    """
    run = UUID(flow_run_id) if flow_run_id else _current_flow_run()
    pages = {"Prefect run": _page(run), **(links or {})}
    shown = {name: url for name, url in pages.items() if url}
    _log.info("notice: %s", "; ".join([title, *lines]))
    # At the same time: neither waits for the other when a server hangs.
    artifact = in_daemon_thread(lambda: _write_artifact(title, lines, shown, run), "notice-artifact")
    webhook = in_daemon_thread(lambda: _post(title, lines, shown), "notice-webhook")
    both: list[Future[Any]] = [artifact, webhook]
    wait(both, timeout=_SECONDS)
    _warn("artifact", title, artifact)
    return not _warn("webhook", title, webhook) and webhook.result()


def _warn(receiver: str, title: str, sent: Future[Any]) -> bool:
    """Log why a notice was not sent. Returns whether there was a reason."""
    if not sent.done():
        _log.warning("the notice %r was given up after %g s: the %s does not answer", title, _SECONDS, receiver)
        return True
    error = sent.exception()
    if isinstance(error, HTTPError):
        _log.warning("the %s refused a notice: HTTP %d", receiver, error.code)
    elif error is not None:  # its text might hold the URL
        _log.warning("the %s got no notice: %s", receiver, type(error).__name__)
    return error is not None


def _post(title: str, lines: Sequence[str], links: Mapping[str, str]) -> bool:
    """Slack's format, which Mattermost, Rocket.Chat and others take too."""
    url = os.environ.get("FINETUNE_WEBHOOK_URL")
    if not url:
        return False
    text = "\n".join([f"*{title}*", *lines])[:_TEXT]
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "\n".join([text, *(f"<{link}|{name}>" for name, link in links.items())])
    body = json.dumps({"text": text}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=_SECONDS) as answer:
        return bool(200 <= answer.status < 300)


def _write_artifact(title: str, lines: Sequence[str], links: Mapping[str, str], flow_run_id: UUID | None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate

    text = [f"**{title}**", *lines, *(f"[{name}]({link})" for name, link in links.items())]
    artifact = ArtifactCreate(
        key="notice", type="markdown", description=title, data="\n\n".join(text), flow_run_id=flow_run_id
    )
    with get_client(sync_client=True) as client:
        client.create_artifact(artifact)


def _page(run: UUID | None) -> str | None:
    from prefect.utilities.urls import url_for

    return url_for("flow-run", run) if run else None


def _current_flow_run() -> UUID | None:
    from prefect.runtime import flow_run

    return UUID(str(flow_run.id)) if flow_run.id else None
