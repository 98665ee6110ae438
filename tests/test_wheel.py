"""The project as a wheel: what it holds, and that it runs where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests", "docs", "results")
    shutil.copytree(ROOT, folder / "source", ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "./source"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_it_holds_every_package_and_never_mlflow(wheel: Path) -> None:
    """All Python files of the four packages, their data, and nothing that would shadow a library."""
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("flows", "tasks", "model", "ops")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in names if ".dist-info/" not in name}
    assert held == sources
    assert {
        "flows/prefect.yaml",
        "ops/stack/supervisord.conf",
        "ops/report/templates/page.html",
        "model/demo/base/model.safetensors",
    } <= held


@pytest.mark.slow
def test_it_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """``python -m flows`` outside any checkout: only the wheel is installed, the libraries come by a path.

    A path file of the environment's own does not bring in this checkout, which is installed there as editable.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lent = tmp_path / "venv" / "lib" / version / "site-packages" / "lent.pth"
    lent.write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FINETUNE"))}
    environment |= {"FINETUNE_DATA_ROOT": str(tmp_path / "root"), "FINETUNE_LOCKS": os.environ["FINETUNE_LOCKS"]}
    (tmp_path / "elsewhere").mkdir()
    command = [str(python), "-m", "flows", "max_steps=1", "sample_rows=0", "pass_rows=0", "eval_rows=20"]
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("run: ")
    where = subprocess.run(
        [str(python), "-c", "import flows, ops; print(flows.__file__, ops.__file__)"],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(path.startswith(str(tmp_path / "venv")) for path in where.stdout.split())
