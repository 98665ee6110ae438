from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH on which there is no bwrap."""
    monkeypatch.setenv("PATH", str(tmp_path))
