"""The place in the installed Prefect that is patched exists, and the patch does what it is for."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import prefect.server.api.server as server
import pytest

from ops.stack.temporary_server import detach_temporary_server


def test_the_installed_prefect_starts_its_server_by_the_name_that_is_patched() -> None:
    """Fails with a Prefect that starts it another way: then Ctrl-C would reach the server again."""
    assert server.subprocess is subprocess  # type: ignore[attr-defined]
    source = inspect.getsource(server.SubprocessASGIServer._run_uvicorn_command)
    assert "return subprocess.Popen(" in source
    assert "start_new_session" not in source  # else the patch is no longer needed
    assert "subprocess.TimeoutExpired" in inspect.getsource(server.SubprocessASGIServer.stop)


def test_the_server_has_a_session_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal to the group of this process reaches it; no other module starts its processes differently."""
    monkeypatch.setattr(server, "subprocess", subprocess)  # put back afterwards
    detach_temporary_server()
    assert server.subprocess.TimeoutExpired is subprocess.TimeoutExpired  # type: ignore[attr-defined]
    process = server.subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # type: ignore[attr-defined]
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        process.communicate(b"\n")
    assert subprocess.Popen is not server.subprocess.Popen  # type: ignore[attr-defined]
