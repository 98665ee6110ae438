"""Where the time goes is told without gaps."""

from __future__ import annotations

import time

import pytest

from ops.tracking.stopwatch import Laps


def test_laps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step has what was since the one before; equal names add up, and nothing is lost."""
    clock = iter([10.0, 11.0, 14.0, 14.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    laps = Laps()
    for step in ("mlflow", "prepare", "mlflow"):
        laps.end(step)
    assert laps.seconds == {"mlflow": 1.5, "prepare": 3.0}
