"""Row 48 in small: kills of anything at random moments, over a training and three nights (`make soak`: the whole)."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import soak


@pytest.mark.slow
def test_row_48_kills_of_anything_over_a_training_and_three_nights(tmp_path: Path) -> None:
    """Eight kills, and one other signal: everything that MLflow has equals the undisturbed, and nothing is left."""
    report = soak(tmp_path, kills=8, seed=48, steps=40)
    assert report.faults == []
    assert len([hit for hit in report.hits if hit.kill.signal.name == "SIGKILL"]) == 8
    assert report.compared["versions"] == 4
    assert report.compared["metric points"] > 400
