"""The watcher: which slots it mends, and that it survives servers that do not answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from ops.recovery.limits import LIMIT, ensure_limit, set_active, set_limit
from ops.recovery.watch import Watcher
from ops.settings import Settings


def test_the_watcher_mends_slots_at_the_second_check(
    prefect: Any, settings: Settings, lease: Callable[[str], UUID]
) -> None:
    """A slot is counted a moment before its lease exists, so a single finding is not mended."""
    ensure_limit(prefect, 2)
    set_active(prefect, 2)
    watcher = Watcher(settings, 2)
    assert watcher.check() == []
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).active_slots == 2
    (line,) = watcher.check()
    assert line.endswith(": mended")
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0
    assert watcher.check() == []


def test_the_watcher_does_not_change_the_limit(prefect: Any, settings: Settings) -> None:
    """People may set it to 0 to stop trainings."""
    ensure_limit(prefect, 2)
    set_limit(prefect, 0)
    watcher = Watcher(settings, 2)
    assert watcher.check() == watcher.check() == []
    assert prefect.read_global_concurrency_limit_by_name(LIMIT).limit == 0


def test_the_watcher_survives_servers_that_do_not_answer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither Prefect nor MLflow answers: each error is logged once."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    caplog.set_level("INFO", logger="watch")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # each pauses for seconds
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        watcher = Watcher(Settings(settings.data_root, "http://127.0.0.1:9"), 1)
        assert watcher.check() == watcher.check() == []
    messages = [record.message for record in caplog.records if record.name == "watch"]
    assert len([m for m in messages if "no Prefect server answers" in m]) == 1
    assert len([m for m in messages if m.startswith("MLflow")]) == 1
