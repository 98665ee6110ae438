from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fakehub() -> ModuleType:
    """The module fakehub.py, loaded by its path because the tests are not packages."""
    spec = importlib.util.spec_from_file_location("fakehub", Path(__file__).with_name("fakehub.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(fakehub: ModuleType) -> Iterator[Any]:
    with fakehub.FakeHub() as running:
        yield running


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database for tests to copy, because its migrations take seconds."""
    from ops.tracking.runs import client

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path
