"""Prefect's temporary server, which `make run` uses where no server runs: in its own session, behind a Host check."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

from ops.settings import PROJECT_ROOT

_APP = "prefect.server.api.server:create_app"
_CHECKED_APP = "ops.stack.host_check:create_app"


def detach_temporary_server() -> None:
    """Let Prefect start its temporary server in a session of its own. To be called before the first client.

    A terminal sends Ctrl-C to the whole process group. If the server ended by it too, the flow run's last state could
    not be stored, and Prefect's client would retry for two minutes. Prefect has no setting for this (seen in 3.8.8):
    its module prefect.server.api.server calls ``subprocess.Popen``, and that name is replaced in that module alone.
    The command is changed to serve the application behind the check of the Host header.
    """
    # Imported here: it takes seconds, and two threads must not import parts of one package.
    import prefect.server.api.server as server

    def popen(args: list[str], **options: Any) -> subprocess.Popen[Any]:
        if _APP in args:
            args = [_CHECKED_APP if argument == _APP else argument for argument in args]
            args[args.index("--app-dir") + 1] = str(PROJECT_ROOT)
        return subprocess.Popen(args, start_new_session=True, **options)

    server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # type: ignore[assignment, attr-defined]
