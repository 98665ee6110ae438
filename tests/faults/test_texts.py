"""Texts that Prefect cannot store, with a real server: FAULTS 45."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.arguments import complaint


def _last_run() -> Any:
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(limit=1, sort="EXPECTED_START_TIME_DESC")  # type: ignore[arg-type]
        return run


@pytest.mark.parametrize("place", ["task", "flow"])
def test_no_flow_stays_running(
    place: str, prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error with a lone surrogate, injected into a task or between two tasks, ends both sides with its message."""
    import flows.finetune as module
    import tasks.download
    from ops.tracking.connection import client

    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def broken(*arguments: Any) -> Any:
        raise ValueError("row 3 has \ud800 and \0")

    if place == "task":
        monkeypatch.setattr(tasks.download, "_dataset", broken)
    else:
        monkeypatch.setattr(module, "announce", broken)
    small = {"model_size": "tiny", "dataset": "demo", "device": "cpu", "num_unfrozen_layers": 1, "max_length": 128}
    state = module.finetune(**small, return_state=True)  # type: ignore[call-overload]
    assert state.is_failed()
    run = _last_run()
    assert run.state.is_failed()
    assert "row 3 has \\ud800 and \\x00" in run.state.message
    mlflow = client(uri)
    (found,) = mlflow.search_runs([mlflow.get_experiment_by_name("finetune").experiment_id])
    assert found.info.status == "FAILED"


def test_a_parameter_that_is_no_text() -> None:
    """It is named before anything is started."""
    assert (
        complaint({"dataset": "rows-\udcff.jsonl"}) == "dataset has a character that is no text: rows-\\udcff.jsonl"
    )
