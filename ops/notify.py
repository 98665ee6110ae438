"""Short notices to a webhook, to apprise's addresses and to Prefect's artifacts.

None of them delays a run by more than 5 s or fails it.
"""

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

from ops.redaction import redact, without_credentials
from ops.text import storable
from ops.threads import in_daemon_thread

_SECONDS = 5.0  # time limit for all receivers together
ADDRESSES = "FINETUNE_NOTIFY"  # environment variable: addresses in apprise's form, separated by spaces or commas
_TEXT = 3000  # characters; Slack cuts at 4,000
_log = logging.getLogger(__name__)


class ReceiverError(RuntimeError):
    """A receiver of FINETUNE_NOTIFY did not get a notice. The message contains no address."""


def notify(
    title: str,
    lines: Sequence[str] = (),
    links: Mapping[str, str | None] | None = None,
    flow_run_id: str | None = None,
) -> bool:
    """Send a notice to FINETUNE_WEBHOOK_URL and FINETUNE_NOTIFY, as far as they are set, and write it as an artifact.

    The artifact in Prefect is called ``notice``. The addresses are secrets: they are read from the environment
    at each call, and neither logged nor stored. Errors are logged as warnings and never raised.

    Args:
        title: one line.
        lines: the text, a few short lines.
        links: URLs by their titles, shown behind the link to the Prefect run; a URL of None is left out.
        flow_run_id: id of the Prefect run that the notice is about; by default the current one.

    Returns:
        Whether the webhook and all of apprise's receivers accepted the notice; False if none is set.
    """
    title, lines = storable(redact(title)), [storable(redact(line)) for line in lines]
    run = UUID(flow_run_id) if flow_run_id else _current_flow_run()
    pages = {"Prefect run": _page(run), **(links or {})}
    shown = {name: without_credentials(url) for name, url in pages.items() if url}
    _log.info("notice: %s", "; ".join([title, *lines]))
    # All at once, so that one server that hangs does not delay the other notices.
    artifact = in_daemon_thread(lambda: _write_artifact(title, lines, shown, run), "notice-artifact")
    webhook = in_daemon_thread(lambda: _post(title, lines, shown), "notice-webhook")
    receivers = in_daemon_thread(lambda: _send(title, lines, shown), "notice-apprise")
    sent: list[Future[Any]] = [artifact, webhook, receivers]
    wait(sent, timeout=_SECONDS)
    _warn("artifact", title, artifact)
    failed = [_warn("webhook", title, webhook), _warn(f"receiver in {ADDRESSES}", title, receivers)]
    answers = (
        [] if any(failed) else [answer for answer in (webhook.result(), receivers.result()) if answer is not None]
    )
    return bool(answers) and all(answers)


def _warn(receiver: str, title: str, sent: Future[Any]) -> bool:
    """Log a warning if a notice was not sent. Returns whether it was not."""
    if not sent.done():
        _log.warning("the notice %r was given up after %g s: the %s does not answer", title, _SECONDS, receiver)
        return True
    error = sent.exception()
    if isinstance(error, HTTPError):
        _log.warning("the %s refused a notice: HTTP %d", receiver, error.code)
    elif isinstance(error, ReceiverError):
        _log.warning("the %s got no notice: %s", receiver, error)
    elif isinstance(error, ImportError):
        _log.warning("%s is set, and apprise is not installed: pip install -e '.[notify]'", ADDRESSES)
    elif error is not None:  # only the type: the text may contain the URL
        _log.warning("the %s got no notice: %s", receiver, type(error).__name__)
    return error is not None


def _post(title: str, lines: Sequence[str], links: Mapping[str, str]) -> bool | None:
    """Post in Slack's format, which Mattermost, Rocket.Chat and others accept too; None where no webhook is set."""
    url = os.environ.get("FINETUNE_WEBHOOK_URL")
    if not url:
        return None
    text = "\n".join([f"*{title}*", *lines])[:_TEXT]
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = "\n".join([text, *(f"<{link}|{name}>" for name, link in links.items())])
    body = json.dumps({"text": text}).encode()
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=_SECONDS) as answer:
        return bool(200 <= answer.status < 300)


def _send(title: str, lines: Sequence[str], links: Mapping[str, str]) -> bool | None:
    """Send to apprise's receivers: mail, chat, push services. Returns None where none is set.

    Raises:
        ReceiverError: an address has no form that apprise knows, or a receiver refused the notice.
        ImportError: apprise is not installed.
    """
    addresses = os.environ.get(ADDRESSES, "").replace(",", " ").split()
    if not addresses:
        return None
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its warnings contain addresses
    receivers = apprise.Apprise()
    if not all([receivers.add(address) for address in addresses]):
        raise ReceiverError("an address is none that apprise knows")
    body = "\n".join([*(line[:_TEXT] for line in lines), *(f"{name}: {link}" for name, link in links.items())])
    if not receivers.notify(title=title, body=body or title, body_format=apprise.NotifyFormat.TEXT):
        raise ReceiverError("a receiver refused the notice, or did not answer")
    return True


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
