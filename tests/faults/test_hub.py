"""Row 14 of the table of faults with the pauses as shipped; tests/ops/test_hub.py has the others with short ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub, Fault

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, time
from pathlib import Path
from ops import hub
begin = time.monotonic()
try:
    hub.fetch_weights("org/tiny", "main", Path(sys.argv[1]))
except hub.HubError as error:
    print(error)
print(time.monotonic() - begin)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


def _fetch(hub: Any, cache: Path) -> tuple[str, float, list[float]]:
    """The error, seconds, and the moments at which the hub was asked for the list of files."""
    moments: list[float] = []
    fault = hub.fault

    def noted(path: str, *kinds: str) -> Any:
        if "/api/models/" in path and "status" in kinds:
            moments.append(time.monotonic())
        return fault(path, *kinds)

    hub.fault = noted
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache / "home"), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache)], env=inherited | own, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    *error, seconds = done.stdout.splitlines()
    return " ".join(error), float(seconds), moments


@pytest.mark.parametrize(("status", "headers"), [(503, {}), (429, {"Retry-After": "3600"})])
def test_row_14_a_busy_hub_is_asked_three_times(
    status: int, headers: dict[str, str], hub: Any, tmp_path: Path
) -> None:
    """With a second and three seconds in between, whatever Retry-After asks for; the error names the local option."""
    hub.faults = [Fault("status", status=status, headers=headers)]
    error, seconds, moments = _fetch(hub, tmp_path)
    assert f"HTTP {status}" in error
    assert "weights_dir" in error
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert gaps == [pytest.approx(1, abs=0.9), pytest.approx(3, abs=0.9)]
    assert 4 <= seconds < 15


def test_row_14_a_hub_that_is_busy_for_a_moment(hub: Any, tmp_path: Path) -> None:
    """503, then 429: the third answer counts, here that there is no such repository."""
    hub.faults = [Fault("status", 1, "/api/models/", status) for status in (503, 429)]
    error, seconds, moments = _fetch(hub, tmp_path)
    assert "RepositoryNotFoundError" in error or "HTTP 404" in error
    assert len(moments) == 3
    assert 4 <= seconds < 15
