"""What is said to be in the registry, on a real sqlite store."""

from __future__ import annotations

from pathlib import Path

from ops.tracking.connection import client
from ops.tracking.registered import Registered, ask_registered


def test_a_registry_of_many_models_is_read_whole(tmp_path: Path, mlflow_database: Path) -> None:
    """MLflow gives a hundred models at a time: a model behind them would be said not to be there."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    mlflow = client(f"sqlite:///{tmp_path}/mlflow.db")
    names = [f"model-{number:03}" for number in range(101)]
    for name in names:
        mlflow.create_registered_model(name)
    mlflow.create_model_version(names[-1], str(tmp_path))
    assert ask_registered(mlflow, names[-1]) == Registered(names[-1:], [1])
    assert ask_registered(mlflow, "another") == Registered(names)
