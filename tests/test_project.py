"""The project as a whole: imports point one way, names agree, the folder mlflow/ shadows nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "ops", "model")
# What each package may import of the others. A sub-package may import of its own package what stands below it.
MAY_IMPORT = {
    "flows": {"tasks", "ops", "model", "prefect"},
    "tasks": {"ops", "model", "prefect"},
    "ops": {"model", "mlflow", "prefect"},
    "model": set(),
}
# From the top to the bottom: a room imports what stands further down only. "*" stands for the package's own files.
ROOMS = {
    "model": ["demo", "evaluation", "generation", "engine", "data", "net", "*"],
    "ops": ["stack", "recovery", "tracking", "report", "machine", "sandbox", "*"],
}
# `from model import GPTModel` and `import ops` are the public face and the environment's defaults.
FACES = {"model", "ops"}
DELEGATES = ("model/net/gpt.py", "model.net.loading")  # from_pretrained and save_pretrained, inside the functions


def _modules(package: str) -> dict[str, Path]:
    """Every Python file of a package, at any depth, by its dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(path: Path, modules: Mapping[str, Path]) -> set[str]:
    """The modules that a file imports, by their dotted names: anywhere in it, but for type checkers alone."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.add(deeper if deeper in modules else str(node.module))
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    """flows -> tasks -> ops -> model; model/ knows neither Prefect nor MLflow, tasks reach MLflow through ops."""
    watched = {*PACKAGES, "prefect", "mlflow"}
    modules = _modules(package)
    assert len(modules) >= 5, "the files were found"
    for path in modules.values():
        foreign = ({name.split(".")[0] for name in _imported(path, modules)} & watched) - {package}
        assert foreign <= MAY_IMPORT[package], f"{path} imports {foreign - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_rooms_below_them(package: str) -> None:
    """Inside a package too, imports point one way, at every depth, and every folder is a room of the list."""
    order = ROOMS[package]
    folders = {path.parent.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*.py")} - {"."}
    assert folders == set(order) - {"*"}
    modules = _modules(package)

    def room(module: str) -> str:
        parts = module.split(".")
        return parts[1] if len(parts) > 1 and parts[1] in order else "*"

    for module, path in modules.items():
        if module == package:
            continue
        for imported in _imported(path, modules):
            if imported.split(".")[0] == package and imported not in FACES:
                assert order.index(room(imported)) >= order.index(room(module)), f"{path} imports {imported}"


def test_no_two_files_import_each_other() -> None:
    """There is no circle of imports between files, at module level or inside functions."""
    modules = {name: path for package in PACKAGES for name, path in _modules(package).items()}
    arrows = {name: (_imported(path, modules) & modules.keys()) - FACES for name, path in modules.items()}
    arrows["model.net.gpt"] -= {DELEGATES[1]}
    order = TopologicalSorter({name: found - {name} for name, found in arrows.items()})
    order.prepare()  # raises CycleError, which names the circle


# Test files that are about a theme, and not about one module.
THEMES = {
    "model": {
        "data/test_fuzz.py",
        "engine/test_cuda.py",
        "engine/test_fuzz.py",
        "engine/test_ranks_cuda.py",
        "engine/test_sameness.py",
        "engine/test_trunk_sharing_cuda.py",
        "generation/test_cuda.py",
        "net/test_fuzz.py",
    },
    "ops": {
        "machine/test_fuzz.py",
        "sandbox/test_processes.py",
        "sandbox/test_siblings.py",
        "stack/test_pages.py",
        "stack/test_postgres.py",
        "stack/test_secured.py",
    },
    "flows": {
        "test_deployments.py",
        "test_fuzz.py",
        "test_nights.py",
        "test_pictures.py",
        "test_resume.py",
        "test_main.py",
    },
    "tasks": {"test_fuzz.py"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_mirror_the_packages(package: str) -> None:
    """A module's tests lie where the module does; the others are the themes above."""
    folder = ROOT / "tests" / package
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    found -= {name for name in found if name.endswith("conftest.py")} | THEMES[package]
    for name in found:
        module = ROOT / package / name.replace("test_", "")
        said = (
            f"tests/{package}/{name} has no {module.relative_to(ROOT)}: name it after its module, or add it to THEMES"
        )
        assert module.exists(), said
    assert all((folder / name).exists() for name in THEMES[package])


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
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sorted(packages) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert all((folder / "__init__.py").read_text().startswith('"""') for folder in folders), "each says what it is"


def test_every_dependency_says_why() -> None:
    """Each line of the dependency lists carries its reason."""
    text = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools]")[0]
    requirements = [line for line in text.splitlines() if re.match(r'\s+"[a-zA-Z-]+([<>=]|",)', line)]
    assert len(requirements) > 10
    assert [line for line in requirements if "#" not in line and "setuptools" not in line] == []


# Imported where one function needs it, which says how to install it. Module and package have the same name.
OPTIONAL = {"gguf", "apprise"}


def test_every_third_party_import_is_declared_and_pinned() -> None:
    """What the packages import is a dependency in pyproject.toml, and constraints.txt pins every dependency."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        project = tomllib.load(stream)["project"]
    declared = {_distribution(line) for line in project["dependencies"]}
    modules = {name: path for package in PACKAGES for name, path in _modules(package).items()}
    imported = {name.split(".")[0] for path in modules.values() for name in _imported(path, modules)}
    distributions = packages_distributions()
    # triton comes with torch's CUDA builds, cryptography and the like only with extras of others.
    foreign = {name for name in imported - {*PACKAGES, "triton"} if name not in sys.stdlib_module_names}
    extras = {_distribution(line) for lines in project["optional-dependencies"].values() for line in lines}
    for name in foreign - OPTIONAL:
        owners = {_distribution(owner) for owner in distributions[name]}
        assert owners & declared, f"{name} is imported, and {owners} not among the dependencies of pyproject.toml"
    assert extras >= OPTIONAL
    assert foreign >= OPTIONAL
    pinned = {_distribution(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert (declared | OPTIONAL) - {"torch"} <= pinned


def _distribution(requirement: str) -> str:
    """The normalised name in a requirement (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()  # type: ignore[index]


def _deployments() -> dict[str, dict]:  # type: ignore[type-arg]
    return {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


def test_deployments_fit_the_flow() -> None:
    """The names that users type, each with parameters that the flow accepts and a description."""
    from flows.finetune import finetune
    from flows.sweep import sweep

    deployments = _deployments()
    sweeps = ["sweep-tiny", "sweep-124m", "sweep-355m"]
    assert list(deployments) == ["tiny", "124m", "355m", "774m", "1558m", *sweeps, "nightly"]
    for name, deployment in deployments.items():
        assert deployment["entrypoint"] == ("flows.sweep.sweep" if name in sweeps else "flows.finetune.finetune")
        assert deployment["work_pool"]["name"] == "gpu"
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False
        assert deployment["description"]
        (sweep if name in sweeps else finetune).validate_parameters(deployment["parameters"])
        if name != "nightly":
            assert deployment["parameters"]["model_size"] == name.removeprefix("sweep-")
    (schedule,) = deployments["nightly"]["schedules"]
    assert schedule["timezone"] == "UTC"


def test_every_test_that_is_named_as_a_proof_exists() -> None:
    """docs/reliability.md names tests as path::name, and has all rows of the table of faults."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", text))
    assert len(named) > 50
    for path, name in sorted(named):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name} does not exist"
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 49))
    for number, proof in rows:
        assert "::" in proof or "not yet" in proof, f"row {number}"


def test_make_targets_of_the_pages_exist() -> None:
    """A reader can type every `make ...` that a page shows."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        shown = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE))
        assert shown <= targets | {"itself"}, page
        assert page.name != "README.md" or {"run", "test"} <= shown


@pytest.mark.slow
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
    few = ["max_steps=3", "eval_rows=40", "sample_rows=1", "pass_rows=20", "max_new_tokens=4"]
    command = [sys.executable, "-m", "flows", *few]
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
    ask = [sys.executable, "-m", "ops.tracking.sample", "Write a function.", "--max-new-tokens", "4"]
    answer = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "gpt2-code-tiny version 1" in answer.stderr
    assert sorted(path.name for path in (tmp_path / "root").iterdir() if not path.name.startswith(".")) == [
        "base-outputs", "demo", "flavours", "locks", "matplotlib", "mlflow", "models", "prefect", "tokens",
        "trainings", "trunk-outputs",
    ]  # fmt: skip
