"""Prefect's temporary server, which `make run` uses where no server runs: kept out of the terminal's reach."""

from __future__ import annotations

import subprocess
from functools import partial
from types import SimpleNamespace


def detach_temporary_server() -> None:
    """Let Prefect start its temporary server in a session of its own. To be called before the first client.

    Ctrl-C in a terminal is sent to the whole process group. A server that ends by it cannot be told how the run ended,
    and Prefect's client asks it for two minutes. Prefect has no setting for this (seen in 3.8.8): its module
    prefect.server.api.server calls ``subprocess.Popen``, so that name is replaced in that module alone.
    """
    # Imported here: it takes seconds, and two threads must not import parts of one package.
    import prefect.server.api.server as server

    popen = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # type: ignore[assignment, attr-defined]
