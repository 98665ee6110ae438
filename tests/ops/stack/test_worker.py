"""The command of the worker; tests/faults/test_worker.py has its work and its end."""

from __future__ import annotations

import pytest

from ops.stack.worker import main


def test_what_it_cannot_do_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of no runs, and no server."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for arguments, message in (
        (["--limit", "0"], "--limit 0 is no number of flow runs: 1 is the lowest"),
        ([], "PREFECT_API_URL must be set to the server's address, as client.env of make up does"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")
