"""The hook of a crashed run, on real servers: what it makes of a run whose process died after its work was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect import states
from prefect.client.orchestration import get_client

from flows.finetune import finetune
from flows.hooks import after_crash
from ops.recovery.reaper import ATTEMPT_TAG, FLOW_RUN_TAG, close_run
from ops.settings import Settings
from ops.tracking.connection import client, open_experiment
from ops.tracking.runs import PARENT_TAG, REASON_TAG, RunRef, create_run, set_tags, tracked_run


@pytest.mark.parametrize(
    ("attempt", "error", "further", "end", "status", "notices"),
    [
        ("1", None, {}, "COMPLETED", "FINISHED", 0),
        ("0", None, {}, "CRASHED", "FINISHED", 1),
        ("1", OSError, {}, "CRASHED", "FAILED", 1),
        ("1", None, {PARENT_TAG: "of a sweep"}, "CRASHED", "FINISHED", 1),  # a trial has finished, and not the sweep
    ],
)
def test_a_process_that_dies_after_its_work(
    prefect_server: None,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: str,
    error: type[Exception] | None,
    further: dict[str, str],
    end: str,
    status: str,
    notices: int,
) -> None:
    """Both sides say that it is done, if MLflow's run of this attempt is FINISHED; else it has crashed."""
    sent: list[Any] = []
    monkeypatch.setattr("flows.hooks.notify", lambda *arguments: sent.append(arguments))
    with get_client(sync_client=True) as prefect:
        crashed = states.Crashed(message="exit code -9")
        made = prefect.create_flow_run(finetune, parameters={}, state=states.Running())
        prefect.set_flow_run_state(made.id, crashed, force=True)
        flow_run = prefect.read_flow_run(made.id)
        assert flow_run.run_count == 1
        tags = {FLOW_RUN_TAG: str(made.id), ATTEMPT_TAG: attempt, **further}
        try:
            with tracked_run(Settings.load(), "a run", {}, tags) as run:
                if error:
                    raise error
        except OSError:
            pass
        after_crash(finetune, flow_run, crashed)
        assert prefect.read_flow_run(made.id).state.type.value == end
    assert client(run.tracking_uri).get_run(run.run_id).info.status == status
    # The name that the flow gave its run, and not that of Prefect, which the worker knows.
    assert [notice[0] for notice in sent] == ["finetune crashed: a run"] * notices
    assert made.name != "a run"


@pytest.mark.parametrize(("is_closed", "notices"), [(True, 0), (False, 1)])
def test_one_notice_of_hook_and_reaper(
    prefect_server: None, data_root: Path, monkeypatch: pytest.MonkeyPatch, is_closed: bool, notices: int
) -> None:
    """The reaper has closed the run and sent its notice; or MLflow failed after it had said why, and before that."""
    sent: list[Any] = []
    monkeypatch.setattr("flows.hooks.notify", lambda *arguments: sent.append(arguments))
    settings = Settings.load()
    mlflow = client(settings.tracking_uri)
    with get_client(sync_client=True) as prefect:
        crashed = states.Crashed(message="exit code -9")
        made = prefect.create_flow_run(finetune, parameters={}, state=states.Running())
        prefect.set_flow_run_state(made.id, crashed, force=True)
        tags = {FLOW_RUN_TAG: str(made.id), ATTEMPT_TAG: "1"}
        opened = create_run(mlflow, open_experiment(mlflow, settings), "a run", tags)
        run = RunRef(settings.tracking_uri, opened.info.experiment_id, opened.info.run_id)
        if is_closed:
            assert close_run(run, "KILLED", "Prefect: Crashed")
        else:
            set_tags(run, {REASON_TAG: "Prefect: Crashed"})
        after_crash(finetune, prefect.read_flow_run(made.id), crashed)
    assert mlflow.get_run(run.run_id).info.status == "KILLED"
    assert len(sent) == notices
