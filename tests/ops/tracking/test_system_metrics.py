"""System metrics: samples in MLflow while a run is open, and that neither a dead server nor their end delays it."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
from made_up import free_ports

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.runs import RunRef, tracked_run
from ops.tracking.system_metrics import system_metrics

LOG = logging.getLogger("system metrics")
CPU, MEMORY = "system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"


@pytest.fixture
def settings(tmp_path: Path, mlflow_database: Path) -> Settings:
    return Settings(tmp_path / "root", f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}")


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "system-metrics"]


def test_samples_are_logged_while_the_run_is_open(settings: Settings) -> None:
    """With growing steps, the last one at the end; the thread ends with the body."""
    with tracked_run(settings, "a run", {}, {}) as run, system_metrics(run, True, LOG, 0.2):
        time.sleep(2)
        assert _threads()
    assert not _threads()
    mlflow = client(settings.tracking_uri)
    for name in (CPU, MEMORY):
        points = mlflow.get_metric_history(run.run_id, name)
        assert len(points) >= 2
        steps = sorted(point.step for point in points)
        assert len(set(steps)) == len(steps)
    assert points[0].value > 10
    found = mlflow.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert {"system/disk_usage_percentage", "system/network_receive_megabytes"} <= found.data.metrics.keys()


def test_a_short_run_has_a_sample(settings: Settings) -> None:
    with tracked_run(settings, "a run", {}, {}) as run, system_metrics(run, True, LOG):
        pass
    assert CPU in client(settings.tracking_uri).get_run(run.run_id).data.metrics


def test_a_machine_without_a_sensor_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """psutil finds no counters of a network in some containers; the run goes on, and its log says so once."""
    import psutil

    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    with tracked_run(settings, "a run", {}, {}) as run, system_metrics(run, True, LOG, 0.1):
        time.sleep(1)
    told = [record.getMessage() for record in caplog.records if record.name == LOG.name]
    assert len(told) == 1
    assert told[0].startswith("system metrics are missing while MLflow or a sensor does not answer: ")


def test_nothing_is_logged_unless_it_is_wanted(settings: Settings) -> None:
    with tracked_run(settings, "a run", {}, {}) as run, system_metrics(run, False, LOG, 0.1):
        assert not _threads()
    assert client(settings.tracking_uri).get_run(run.run_id).data.metrics == {}


def test_an_error_of_the_run_is_passed_on(settings: Settings) -> None:
    opened = tracked_run(settings, "a run", {}, {})
    with pytest.raises(ZeroDivisionError), opened as run, system_metrics(run, True, LOG, 0.1):
        raise ZeroDivisionError
    assert client(settings.tracking_uri).get_run(run.run_id).info.status == "FAILED"
    assert not _threads()


def test_a_server_that_does_not_answer_delays_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning; the body begins and ends at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (port,) = free_ports(1)
    begun = time.monotonic()
    with system_metrics(RunRef(f"http://127.0.0.1:{port}", "1", "0" * 32), True, LOG, 0.05):
        assert time.monotonic() - begun < 1
        deadline = time.monotonic() + 30
        while "system metrics are missing" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        ended = time.monotonic()
    assert time.monotonic() - ended < 6
    assert caplog.text.count("system metrics are missing while MLflow or a sensor does not answer") == 1
