"""The place in the installed Prefect that is patched exists, and the patch does what it is for."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import prefect.server.api.server as server
import pytest

from ops.stack.temporary_server import _APP, _CHECKED_APP, detach_temporary_server


def test_the_installed_prefect_starts_its_server_by_the_name_that_is_patched() -> None:
    """Fails with a Prefect that starts it another way: then Ctrl-C would reach the server again."""
    assert server.subprocess is subprocess  # type: ignore[attr-defined]
    source = inspect.getsource(server.SubprocessASGIServer._run_uvicorn_command)
    assert "return subprocess.Popen(" in source
    assert '"--app-dir",\n                str(prefect.__module_path__.parent),\n' in source
    assert f'"{_APP}"' in source  # replaced by the application behind the check of the Host header
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


def test_the_server_is_behind_the_check_of_the_host_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that Prefect gives is changed in two places, and no other command is."""
    started: list[list[str]] = []
    monkeypatch.setattr(server, "subprocess", subprocess)
    monkeypatch.setattr(subprocess, "Popen", lambda args, **options: started.append(args))
    detach_temporary_server()
    given = ["python", "-m", "uvicorn", "--app-dir", "elsewhere", "--factory", _APP, "--port", "8001"]
    server.subprocess.Popen(given)  # type: ignore[attr-defined]
    server.subprocess.Popen(["true"])  # type: ignore[attr-defined]
    root = str(Path(__file__).resolve().parents[3])
    assert started[0] == ["python", "-m", "uvicorn", "--app-dir", root, "--factory", _CHECKED_APP, "--port", "8001"]
    assert started[1] == ["true"]
