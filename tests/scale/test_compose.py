"""mlflow/compose.yaml, which no container engine has run here: what can be checked without one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from made_up import ROOT

FILE = ROOT / "mlflow" / "compose.yaml"


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(FILE.read_text())["services"])


def test_the_project_s_services_are_of_its_image(services: dict[str, dict[str, Any]]) -> None:
    own = {name: service for name, service in services.items() if service["image"] == "finetune"}
    assert set(own) == {"prefect", "mlflow", "set-up", "worker", "watch"}
    arguments = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for service in own.values():
        assert set(service["build"]["args"]) <= arguments
        # A worker's runs carry the name of its container: on two machines it must not be the same.
        assert "hostname" not in service
    assert "command" not in own["worker"], "the image's own"


def test_clients_have_addresses_and_credentials(services: dict[str, dict[str, Any]]) -> None:
    """Of services that exist; the store's keys are the server's alone, for files pass through it."""
    for name in ("set-up", "worker", "watch"):
        variables = services[name]["environment"]
        assert variables["PREFECT_API_URL"] == "http://prefect:4200/api"
        assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"} <= set(variables)
        assert not any(variable.startswith("AWS_") for variable in variables)
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].startswith("mlflow:*")
    assert services["mlflow"]["environment"]["MLFLOW_S3_ENDPOINT_URL"] == "http://store:9000"


def test_ports_are_open_on_this_machine_only(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000"]


def test_the_image_leaves_out_data_and_history() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    taken = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert patterns[0] == "*"
    assert {"flows", "model", "ops", "pyproject.toml"} <= taken
    assert not {".git", ".data", ".venv", "tests"} & taken
