"""Secrets are kept out of messages: one function redacts, and logs and errors of libraries pass through it too.

Known secrets are read from the environment at each call: variables whose names say so (HF_TOKEN,
MLFLOW_TRACKING_PASSWORD, FINETUNE_WEBHOOK_URL, ...), and the password in any address that a variable holds. User and
password in an address are removed even if no variable holds them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

_HIDDEN = "[secret]"
_SECRET_NAME = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_KEY|API_KEY|ACCESS_KEY|AUTH_STRING|WEBHOOK_URL|FINETUNE_NOTIFY)$"
)
# The last @ before the host counts: passwords may contain one that is not quoted.
_USER_INFO = re.compile(r"(?<=://)[^/?#\s'\"<>]*@")
_PASSWORD = re.compile(r"://[^/?#\s:@]*:(\S+)@")
_SHORTEST = 6  # characters: hiding every "a" would destroy messages


def without_credentials(uri: str) -> str:
    """A URI, or a text with URIs, without the users and the passwords that may stand before their hosts."""
    return _USER_INFO.sub("", uri)


def redact(text: str) -> str:
    """A text without the user and password of addresses, and without the secrets in this process's environment."""
    text = without_credentials(text)
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets() -> list[str]:
    """The secrets in the environment, as they are and as they stand in an address; the longest first."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()):
            found |= {value, value.partition(":")[2]} if name.endswith("AUTH_STRING") else {value}
            found |= set(value.replace(",", " ").split()) if name == "FINETUNE_NOTIFY" else set()
        found |= set(_PASSWORD.findall(value)) if "://" in value else set()
    found |= {form(secret) for secret in found for form in (unquote, _quoted)}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def _quoted(text: str) -> str:
    return quote(text, safe="")


def redact_error(error: BaseException) -> None:
    """Redact the texts of an exception and of those that led to it, in place, so that it can be raised on."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        args = tuple(redact(part) if isinstance(part, str) else part for part in one.args)
        if args != one.args:
            one.args = args
        fields = dict(vars(one))
        if isinstance(one, OSError):  # its text is made from these, not from its arguments
            fields |= {name: getattr(one, name) for name in ("strerror", "filename", "filename2")}
        for name, value in fields.items():
            if isinstance(value, str) and (shown := redact(value)) != value:
                setattr(one, name, shown)


@contextmanager
def redacted_errors() -> Iterator[None]:
    """Redact what is raised inside: Prefect stores the text of an exception as the message of a state."""
    try:
        yield
    except BaseException as error:
        redact_error(error)
        raise


def redact_logs() -> None:
    """Redact every log record of this process, of all libraries, with its traceback; once is enough."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacted(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        try:
            said = record.getMessage()
        except Exception:  # arguments that do not fit: logging reports that itself
            return record
        if (shown := redact(said)) != said:
            record.msg, record.args = shown, ()
        if record.exc_info and record.exc_info[0] is not None:
            trace = logging.Formatter().formatException(record.exc_info)
            if (shown := redact(trace)) != trace:
                record.exc_text = shown  # handlers take it instead of formatting the exception
        return record

    redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted)


def separate_mlflow_credentials() -> None:
    """Move user and password from MLFLOW_TRACKING_URI to the variables that MLflow has for them.

    MLflow puts the address into its errors, and this project into links. Credentials that the variables hold already
    are kept: MLflow prefers them too. A user without a password cannot be moved, and is removed from messages only.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    match = re.fullmatch(r"(https?://)([^/?#:]*):([^/?#]+)@([^/?#@]+.*)", uri)
    if not match:
        return
    scheme, user, password, rest = match.groups()
    os.environ["MLFLOW_TRACKING_URI"] = scheme + rest
    if not (os.environ.get("MLFLOW_TRACKING_USERNAME") and os.environ.get("MLFLOW_TRACKING_PASSWORD")):
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(user)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
