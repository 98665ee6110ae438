"""The project as a whole: imports point one way, names agree, the folder mlflow/ shadows nothing."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "ops", "model")
MAY_IMPORT = {
    "flows": {"tasks", "ops", "model", "prefect"},
    "tasks": {"ops", "model", "prefect"},
    "ops": {"model", "mlflow", "prefect"},
    "model": set(),
}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    """flows -> tasks -> ops -> model; model/ knows neither Prefect nor MLflow, tasks reach MLflow through ops."""
    watched = {*PACKAGES, "prefect", "mlflow"}
    for path in sorted((ROOT / package).glob("*.py")):
        foreign = (_imported(path) & watched) - {package}
        assert foreign <= MAY_IMPORT[package], f"{path.name} imports {foreign - MAY_IMPORT[package]}"


def test_the_folder_mlflow_shadows_nothing() -> None:
    """From the project's root, import mlflow is the library; the folder holds no Python."""
    assert list((ROOT / "mlflow").rglob("*.py")) == []
    code = "import mlflow; print(mlflow.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "mlflow")


def test_packages_are_listed() -> None:
    """setuptools' own discovery fails on this layout, and a wheel must not carry mlflow/."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        packages = tomllib.load(stream)["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(PACKAGES)


def test_every_dependency_says_why() -> None:
    """Each line of the dependency lists carries its reason."""
    text = (ROOT / "pyproject.toml").read_text()
    requirements = [line for line in text.splitlines() if re.match(r'\s+"[a-zA-Z-]+([<>=]|",)', line)]
    assert len(requirements) > 10
    assert [line for line in requirements if "#" not in line and "setuptools" not in line] == []


def _deployments() -> dict[str, dict]:  # type: ignore[type-arg]
    return {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


def test_deployments_fit_the_flow() -> None:
    """The names that users type, each with parameters that the flow accepts and a description."""
    from flows.finetune import finetune

    deployments = _deployments()
    assert list(deployments) == ["tiny", "124m", "355m", "774m", "1558m", "nightly"]
    for name, deployment in deployments.items():
        assert deployment["entrypoint"] == "flows.finetune.finetune"
        assert deployment["work_pool"]["name"] == "gpu"
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False
        assert deployment["description"]
        finetune.validate_parameters(deployment["parameters"])
        if name != "nightly":
            assert deployment["parameters"]["model_size"] == name
    (schedule,) = deployments["nightly"]["schedules"]
    assert schedule["timezone"] == "UTC"


def test_the_readme_lists_every_parameter() -> None:
    """The README's table and the flow's signature name the same parameters with the same defaults."""
    from flows.finetune import finetune

    text = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", text, flags=re.MULTILINE))
    signature = inspect.signature(finetune.fn).parameters
    shown = {name: "null" if p.default is None else str(p.default) for name, p in signature.items()}
    assert table == shown


def test_make_targets_of_the_readme_exist() -> None:
    """A reader can type every `make ...` that the README shows."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    shown = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", readme, flags=re.MULTILINE))
    assert {"run", "test"} <= shown <= targets


def test_the_embedded_run_ends_with_its_two_lines(tmp_path: Path) -> None:
    """``make run`` in small: a fresh data root, no server; the last two lines are for scripts.

    Servers named in the user's environment are left alone.
    """
    claimed = ("MPLCONFIGDIR", "TRITON_CACHE_DIR")  # by a flow of another test
    environment = {name: value for name, value in os.environ.items() if name not in claimed} | {
        "FINETUNE_DATA_ROOT": str(tmp_path / "root"),
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "flows", "max_steps=3", "sample_rows=1", "max_new_tokens=4"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:]
    *_, tracking, run = done.stdout.splitlines()
    assert tracking == f"tracking: sqlite:///{tmp_path / 'root' / 'mlflow' / 'mlflow.db'}"
    assert re.fullmatch(r"run: [0-9a-f]{32}", run)
    for fact in ("rows", "tokens", "steps", "train (", "device", "disk"):
        assert fact in done.stdout
    environment["MLFLOW_TRACKING_URI"] = tracking.removeprefix("tracking: ")
    ask = [sys.executable, "-m", "ops.sample", "Write a function.", "--max-new-tokens", "4"]
    answer = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "gpt2-code-tiny version 1" in answer.stderr
    assert sorted(path.name for path in (tmp_path / "root").iterdir() if not path.name.startswith(".")) == [
        "demo", "locks", "matplotlib", "mlflow", "prefect", "tokens", "trainings", "trunk-outputs",
    ]  # fmt: skip
