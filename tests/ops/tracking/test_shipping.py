"""The journal's way to MLflow, on a real sqlite store."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from made_up import wait_for

from model.engine.journal import MetricsJournal
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.runs import tracked_run
from ops.tracking.shipping import JournalShipper


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A data root with its own store."""
    return Settings(tmp_path, f"sqlite:///{tmp_path}/mlflow/mlflow.db")


def test_the_journal_arrives_once_and_whole(settings: Settings) -> None:
    """No point twice after a retry, none missing after a resumption, all of them in a run that takes over."""
    path = settings.data_root / "metrics.jsonl"
    journal = MetricsJournal(path)
    mlflow = client(settings.tracking_uri)

    def points(run_id: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "train/loss")]

    with tracked_run(settings, "first", {}, {}) as first:
        for step in range(1, 1501):  # more than one request's worth
            journal.append(step, {"train/loss": 1 / step, "train/lr": 0.1})
        JournalShipper(first, path).ship()
        assert points(first.run_id) == [(step, 1 / step) for step in range(1, 1501)]
        journal.truncate(1400)  # a killed process had got beyond its checkpoint
        JournalShipper(first, path).ship()
        for step in range(1401, 1511):
            journal.append(step, {"train/loss": 1 / step, "train/lr": 0.1})
        JournalShipper(first, path).ship()
        assert points(first.run_id) == [(step, 1 / step) for step in range(1, 1511)]
    with tracked_run(settings, "second", {}, {}) as second:
        JournalShipper(second, path).ship()
        assert points(second.run_id) == points(first.run_id)


def test_a_dead_server_does_not_stop_the_training(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Shipping gives up quickly, says so, and loses nothing."""
    with tracked_run(settings, "a run", {}, {}) as run:
        pass
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = type(run)(f"http://127.0.0.1:{unused.getsockname()[1]}", run.experiment_id, run.run_id)
    journal = MetricsJournal(settings.data_root / "metrics.jsonl")
    journal.append(1, {"train/loss": 1.0})
    started = time.monotonic()
    with JournalShipper(dead, journal.path).in_background() as shipping:
        for step in range(1000):
            shipping.offer(step)
        assert time.monotonic() - started < 1  # the training does not wait
        wait_for("the warning", lambda: "metrics stay in" in caplog.text, 30)
    assert caplog.text.count("metrics stay in") == 1
    JournalShipper(run, journal.path).ship()
    history = client(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
    assert [point.value for point in history] == [1.0]


@pytest.mark.parametrize("content", ["null", "{}", '{"lines": "3"}', '{"lines": -1}', "{", b"\xff", '{"lines": 999}'])
def test_a_damaged_count_of_lines_is_found_again(settings: Settings, content: str | bytes) -> None:
    """MLflow is asked what it has: no point is missing, and none is there twice, though times differ."""
    journal = MetricsJournal(settings.data_root / "metrics.jsonl")
    with tracked_run(settings, "a run", {}, {}) as run:
        shipper = JournalShipper(run, journal.path)
        journal.append(0, {"eval/loss": 1.0})
        for step in range(1, 6):
            journal.append(step, {"train/loss": 1 / step})
        shipper.ship()
        journal.truncate(4)
        for step in range(4, 9):  # steps 4 and 5 again, at another time
            journal.append(step, {"train/loss": 1 / step})
        shipper.progress.write_bytes(content if isinstance(content, bytes) else content.encode())
        shipper.finish()
        history = client(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, 9))
