"""The seconds of a run are accounted for without gaps."""

from __future__ import annotations

import time

import pytest

from ops.tracking.steps import pipeline_step
from ops.tracking.stopwatch import end_step, start_stopwatch


def test_steps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step gets the time since the end of the step before; the seconds of equal names add up."""
    clock = iter([10.0, 11.0, 14.0, 14.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    @pipeline_step
    def prepare(rows: int) -> int:
        return 2 * rows

    stopwatch = start_stopwatch()
    end_step("mlflow")
    assert prepare(4) == 8
    end_step("mlflow")
    assert stopwatch.seconds == {"mlflow": 1.5, "prepare": 3.0}


def test_a_step_that_failed_is_not_counted() -> None:
    """Its seconds belong to the step that is tried next."""

    @pipeline_step
    def train() -> None:
        raise OSError("injected")

    stopwatch = start_stopwatch()
    with pytest.raises(OSError, match="injected"):
        train()
    assert stopwatch.seconds == {}
