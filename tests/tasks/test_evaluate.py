"""The base is scored once for all runs that share it, against a real Prefect server and a real MLflow on sqlite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tasks.row_tests
from ops.sandbox.guards import RowResult, Snippet, run_tests
from ops.settings import Settings
from ops.tracking.finished import read_run

TINY: dict[str, Any] = {
    "model_size": "tiny", "dataset": "demo", "num_unfrozen_layers": 2, "validation_share": 0.1, "max_length": 128,
    "max_steps": 12, "batch_size": 8, "learning_rate": 0.002, "eval_freq": 12, "eval_rows": 40, "sample_rows": 12,
    "pass_rows": 12, "max_new_tokens": 32, "precision": "fp32", "device": "cpu", "score_rows": 40,
}  # fmt: skip


def _records(result: Any) -> list[dict[str, Any]]:
    """The test rows of a run, as MLflow has them."""
    return read_run(result.run.tracking_uri, result.run.run_id).records or []


@pytest.mark.slow
def test_runs_that_differ_in_the_training_share_the_base(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another learning rate, in one process: the base has the same values, bit for bit, and is not run again.

    A third run, whose file is damaged, scores the base again: its values are the same once more.
    """
    from flows.finetune import finetune

    tasks_log = logging.getLogger("prefect.task_runs")
    monkeypatch.setattr(tasks_log, "handlers", [*tasks_log.handlers, caplog.handler])
    monkeypatch.setattr(tasks_log, "propagate", False)  # it does pass on to the root logger until Prefect is set up
    root = tmp_path / "root"
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow/mlflow.db")
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")
    executed: list[int] = []

    def run(snippets: Sequence[Snippet], seconds: float) -> list[RowResult]:
        executed.append(len(snippets))
        return run_tests(snippets, seconds)

    monkeypatch.setattr(tasks.row_tests, "run_tests", run)
    first, second = finetune(**TINY), finetune(**TINY | {"learning_rate": 0.001})
    found = f"base's outputs found, made by run {first.run.run_id}"
    assert {message for message in caplog.messages if message.startswith("base's outputs found")} == {found}
    assert executed[1] <= 12 < executed[0]
    (path,) = Settings.load().base_outputs.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    third = finetune(**TINY | {"learning_rate": 0.0005})
    assert [message for message in caplog.messages if "the base is scored again, because its outputs" in message]
    assert executed[2] > 12
    for name, value in first.metrics.items():
        if name.startswith("untuned/"):
            assert (second.metrics[name], third.metrics[name]) == (value, value), name
    assert len({each.metrics["test/loss"] for each in (first, second, third)}) == 3
    of_base = [
        [{name: record[name] for name in record if name.startswith("base_")} for record in _records(each)]
        for each in (first, second, third)
    ]
    assert len(of_base[0]) == 40
    assert of_base[0] == of_base[1] == of_base[2]
