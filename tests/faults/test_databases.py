"""Databases of `make run` that are damaged, locked, older or newer, and an experiment deleted by hand: FAULTS 46."""

from __future__ import annotations

import os
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows import databases
from flows.commands import UsageError
from flows.databases import check_database, open_mlflow
from ops.tracking.runs import client

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "flows", "max_steps=1", "sample_rows=0", "pass_rows=0", "eval_rows=20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with the experiment. Copied by each test."""
    path = tmp_path_factory.mktemp("made") / "mlflow.db"
    client(f"sqlite:///{path}").create_experiment("finetune")
    return path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A data root with a copy of it, and a database of Prefect's place."""
    for name in ("mlflow/mlflow.db", "prefect/prefect.db"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(made.read_bytes())
    return tmp_path


def _middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = os.urandom(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no database": lambda path: path.write_bytes(b"x" * 5000),
    "header": lambda path: path.write_bytes(b"SQLite" + b"\0" * 100 + path.read_bytes()[106:]),
    "middle": _middle,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def _refused(root: Path) -> tuple[str, float]:
    """What a run prints that ends before it begins, and the seconds it takes."""
    environment = {**os.environ, "FINETUNE_DATA_ROOT": str(root)}
    began = time.monotonic()
    done = subprocess.run(RUN, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stderr, time.monotonic() - began


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["prefect/prefect.db", "mlflow/mlflow.db"])
def test_a_damaged_database_is_named(root: Path, name: str, damage: str) -> None:
    """With the command that moves it away."""
    DAMAGES[damage](root / name)
    with pytest.raises(UsageError, match="is damaged") as caught:
        check_database(root / name, "Prefect")
    assert f"`mv {root / name} {root / name}.damaged`" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefect/prefect.db", "mlflow/mlflow.db"])
def test_a_run_ends_at_a_damaged_database(root: Path, name: str) -> None:
    """One sentence within 10 s."""
    (root / name).write_bytes(b"x" * 5000)
    error, seconds = _refused(root)
    print(f"{seconds:.1f} s: {error}")
    assert "is damaged" in error
    assert error.count("\n") == 1
    assert seconds < 10


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def test_a_locked_database_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a limit, shortened here; a shorter transaction of another process is waited for."""
    path = root / "mlflow" / "mlflow.db"
    began = time.monotonic()
    with monkeypatch.context() as patch, _locked(path):
        patch.setattr(databases, "_LOCK_SECONDS", 1.0)
        with pytest.raises(UsageError, match="is locked by another process"):
            check_database(path, "MLflow")
    assert time.monotonic() - began > 0.9
    hold = "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    hold += "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); time.sleep(1); c.execute('ROLLBACK')"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    check_database(path, "MLflow")
    assert holder.wait(10) == 0


def test_a_folder_in_its_place(root: Path) -> None:
    """It cannot be opened."""
    with pytest.raises(UsageError, match="cannot be opened"):
        check_database(root / "mlflow", "MLflow")


def test_a_whole_database_passes(root: Path) -> None:
    """And so does an empty file, or none."""
    check_database(root / "mlflow" / "mlflow.db", "MLflow")
    (root / "empty.db").touch()
    check_database(root / "empty.db", "MLflow")
    check_database(root / "new folder" / "new.db", "MLflow")


@pytest.mark.parametrize(
    ("revision", "complaint"),
    [
        ("451aebb31d03", "was made by an older MLflow: copy the file, then run `mlflow db upgrade sqlite:"),
        ("ffffffffffff", "a newer MLflow made it, with the schema ffffffffffff: install that one"),
    ],
)
def test_a_database_of_another_mlflow(root: Path, revision: str, complaint: str) -> None:
    """An older one can be upgraded."""
    with closing(sqlite3.connect(root / "mlflow" / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(UsageError) as caught:
        open_mlflow(f"sqlite:///{root}/mlflow/mlflow.db")
    print(caught.value)
    assert complaint in str(caught.value)


def test_a_deleted_experiment(root: Path) -> None:
    """The sentence has the command that restores it, and the command does."""
    uri = f"sqlite:///{root}/mlflow/mlflow.db"
    mlflow = client(uri)
    (experiment,) = [each for each in mlflow.search_experiments() if each.name == "finetune"]
    mlflow.delete_experiment(experiment.experiment_id)
    with pytest.raises(UsageError, match="was deleted") as caught:
        open_mlflow(uri)
    command = str(caught.value).split("`")[1]
    assignment, *words = shlex.split(command)
    name, _, value = assignment.partition("=")
    program = Path(sys.executable).parent / words[0]
    environment = {**os.environ, name: value}
    subprocess.run([str(program), *words[1:]], env=environment, check=True, timeout=60, capture_output=True)
    open_mlflow(uri)


@pytest.mark.slow
@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "2>&1 | head -n 1"])
def test_a_closed_output(closing: str, tmp_path: Path) -> None:
    """A run goes on without one; if the reader of a pipe goes away, it may end. It never waits."""
    environment = {**os.environ, "FINETUNE_DATA_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    command = ["bash", "-c", f"{shlex.join(RUN)} {closing}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s")
    assert done.returncode == 0 or "|" in closing, done.stderr[-3000:]
    assert seconds < 100
