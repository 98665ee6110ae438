"""``finetune nightly [on|off]``: switch the schedule of the nights on or off, or say which it is.

The schedule is that of the deployment ``finetune/nightly`` on Prefect's server. Prefect's page of the deployment has
the same switch.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ops.options import OptionParser
from ops.redaction import redact
from ops.servers import Servers

DEPLOYMENT = "finetune/nightly"
_SECONDS = 15  # for an answer of Prefect's server


class NightlyError(RuntimeError):
    """Prefect's server does not answer, or has no nights; the message says what to do."""


def is_on(url: str, auth: str | None = None) -> bool:
    """Whether nights start by themselves.

    Args:
        url: of Prefect's API.
        auth: ``user:password``, if the server requires one.

    Raises:
        NightlyError: it cannot be said.
    """
    return any(schedule["active"] for schedule in _deployment(url, auth)["schedules"])


def switch(url: str, auth: str | None, active: bool) -> None:
    """Switch the schedule on or off.

    Raises:
        NightlyError: as is_on.
    """
    found = _deployment(url, auth)
    if not found["schedules"]:
        raise NightlyError(f"{DEPLOYMENT} has no schedule: `make deploy` adds it")
    for schedule in found["schedules"]:
        _ask(url, auth, f"deployments/{found['id']}/schedules/{schedule['id']}", {"active": active})


def _deployment(url: str, auth: str | None) -> dict[str, Any]:
    return dict(_ask(url, auth, f"deployments/name/{DEPLOYMENT}"))


def _ask(url: str, auth: str | None, path: str, change: dict[str, Any] | None = None) -> Any:
    """Ask Prefect's REST API, or change what stands at a path. Prefect's client would take seconds to import."""
    headers = {"Content-Type": "application/json"}
    if auth:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    data = None if change is None else json.dumps(change).encode()
    ask = Request(f"{url.rstrip('/')}/{path}", data, headers, method="GET" if change is None else "PATCH")
    try:
        with urlopen(ask, timeout=_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None
    except HTTPError as error:
        if error.code == 404:
            reason = f"Prefect at {url} has no deployment {DEPLOYMENT}: `make deploy` creates it"
        elif error.code == 401:
            reason = f"Prefect at {url} requires a password: source client.env of `make up`"
        else:
            reason = f"Prefect at {url} answers HTTP {error.code}"
        raise NightlyError(redact(reason)) from error
    except (OSError, HTTPException, ValueError) as error:
        said = f"Prefect at {url} does not answer ({error}): start `make up`, or set PREFECT_API_URL to its address"
        raise NightlyError(redact(said)) from error


def describe(active: bool) -> str:
    """Whether nights start by themselves, and how to change it."""
    if active:
        return "The nightly schedule is on; `finetune nightly off` pauses it."
    command = "`finetune nightly on`"
    return f"The nightly schedule is paused; {command} or the switch on Prefect's page of {DEPLOYMENT} turns it on."


def main(arguments: Sequence[str] | None = None) -> int:
    """Switch the nights on or off, or say which it is. Returns the exit status."""
    parser = OptionParser(prog="finetune nightly", description=__doc__)
    parser.add_argument("state", nargs="?", choices=("on", "off"), help="what it is to be; left out, it is said")
    given = parser.parse_args(arguments).state
    try:
        url, auth = os.environ.get("PREFECT_API_URL"), os.environ.get("PREFECT_API_AUTH_STRING")
        if not url:
            known = Servers.load().client_environment()
            url, auth = known["PREFECT_API_URL"], known.get("PREFECT_API_AUTH_STRING")
        if given:
            switch(url, auth, given == "on")
        print(describe(is_on(url, auth)))
    except (NightlyError, ValueError, OSError) as error:
        print(redact(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
