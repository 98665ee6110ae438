"""Prefect's temporary server, which `make run` uses where no server runs: kept out of the terminal's reach."""

from __future__ import annotations

import subprocess
from functools import partial
from types import SimpleNamespace


def detach_temporary_server() -> None:
    """Let Prefect start its temporary server in a session of its own. To be called before the first client.

    A terminal sends Ctrl-C to the whole process group. If the server ended by it too, the flow run's last state could
    not be stored, and Prefect's client would retry for two minutes. Prefect has no setting for this (seen in 3.8.8):
    its module prefect.server.api.server calls ``subprocess.Popen``, and that name is replaced in that module alone.
    """
    # Imported here: it takes seconds, and two threads must not import parts of one package.
    import prefect.server.api.server as server

    popen = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # type: ignore[assignment, attr-defined]
