"""A real Prefect server and a real MLflow on sqlite for the tests of the whole flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def session_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root that the session's tests share; tokens are made once."""
    return tmp_path_factory.mktemp("root")


def _environment(root: Path) -> dict[str, str]:
    return {
        "FINETUNE_DATA_ROOT": str(root),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow/mlflow.db",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of one test's own."""
    for name, value in _environment(tmp_path / "root").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "root"


# Enough to see every part work: 12 steps of a 3-million-parameter model.
TINY: dict[str, Any] = {
    "model_size": "tiny",
    "dataset": "demo",
    "num_unfrozen_layers": 2,
    "validation_share": 0.1,
    "max_length": 128,
    "max_steps": 12,
    "batch_size": 8,
    "learning_rate": 0.002,
    "eval_freq": 5,
    "eval_rows": 40,
    "sample_rows": 3,
    "pass_rows": 20,
    "max_new_tokens": 48,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Parameters of a run that takes seconds."""
    return dict(TINY)


@pytest.fixture(scope="session")
def finished(prefect_server: None, session_root: Path) -> Any:
    """The result of one whole run, for the tests that look at what it left. Read only."""
    from flows.finetune import finetune

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _environment(session_root).items():
            patch.setenv(name, value)
        return finetune(**TINY)


@pytest.fixture
def mlflow_of() -> Callable[[Any], Any]:
    """mlflow_of(run_ref): a client for the run's tracking URI."""
    from ops.tracking.connection import client

    return lambda run: client(run.tracking_uri)
