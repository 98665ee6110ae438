"""Short notices to a chat's webhook and to Prefect's artifacts; neither can hold a run up or make it fail."""

from __future__ import annotations

import contextvars
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import UUID

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
    posted: list[bool] = []
    ways = [
        _start("artifact", lambda: _write_artifact(title, lines, shown, run)),
        _start("webhook", lambda: posted.append(_post(title, lines, shown))),
    ]
    deadline = time.monotonic() + _SECONDS
    for name, thread in ways:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _log.warning("the notice %r was given up after %g s: the %s does not answer", title, _SECONDS, name)
    return bool(posted and posted[0])


def _start(name: str, work: Callable[[], None]) -> tuple[str, threading.Thread]:
    context = contextvars.copy_context()

    def attempt() -> None:
        try:
            context.run(work)
        except HTTPError as error:
            _log.warning("the %s refused a notice: HTTP %d", name, error.code)
        except Exception as error:  # its text might hold the URL
            _log.warning("the %s got no notice: %s", name, type(error).__name__)

    thread = threading.Thread(target=attempt, name=f"notice-{name}", daemon=True)
    thread.start()
    return name, thread


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
