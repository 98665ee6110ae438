"""Databases of `make run` that are damaged, locked, older or newer, and an experiment deleted by hand: FAULTS 46."""

from __future__ import annotations

import os
import re
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
from made_up import MadeUp
from small_disk import small_disk

from flows.databases import open_mlflow
from ops import databases
from ops.databases import MLFLOW, PREFECT, DatabaseError, check_address, check_database
from ops.mistakes import UsageError
from ops.tracking.connection import client

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "flows", "run", "max_steps=1", "sample_rows=0", "pass_rows=0", "eval_rows=20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database with the experiment. Copied by each test."""
    path = tmp_path_factory.mktemp("made") / "mlflow.db"
    client(f"sqlite:///{path}").create_experiment("finetune")
    return path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A data root with a copy of it, and one without a schema of its own in Prefect's place."""
    for name in ("mlflow/mlflow.db", "prefect/prefect.db"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(made.read_bytes())
    with closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as connection, connection:
        connection.execute("DROP TABLE alembic_version")
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
    assert done.returncode == 1, done.stderr[-3000:]  # the machine's, not the user's
    assert "Traceback" not in done.stderr
    return done.stderr, time.monotonic() - began


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["prefect/prefect.db", "mlflow/mlflow.db"])
def test_a_damaged_database_is_named(root: Path, name: str, damage: str) -> None:
    """With the command that moves it away."""
    DAMAGES[damage](root / name)
    with pytest.raises(DatabaseError, match="is damaged") as caught:
        check_database(root / name, PREFECT)
    assert f"`mv {root / name} {root / name}.damaged`" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefect/prefect.db", "mlflow/mlflow.db"])
def test_a_run_ends_at_a_damaged_database(root: Path, name: str) -> None:
    """One sentence within 10 s."""
    (root / name).write_bytes(b"x" * 5000)
    error, seconds = _refused(root)
    print(f"{seconds:.1f} s: {error}")
    assert "is damaged" in error
    assert re.fullmatch(r"\d\d:\d\d:\d\d importing torch and Prefect[^\n]*\n[^\n]+\n", error)
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
        with pytest.raises(DatabaseError, match="is locked by another process"):
            check_database(path, MLFLOW)
    assert time.monotonic() - began > 0.9
    hold = "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    hold += "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); time.sleep(1); c.execute('ROLLBACK')"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    check_database(path, MLFLOW)
    assert holder.wait(10) == 0


def test_a_folder_in_its_place(root: Path) -> None:
    """It cannot be opened."""
    with pytest.raises(DatabaseError, match="cannot be opened"):
        check_database(root / "mlflow", MLFLOW)


@pytest.mark.parametrize("owner", [PREFECT, MLFLOW])
def test_a_path_that_is_too_long_for_sqlite(tmp_path: Path, owner: str) -> None:
    """The server would try for 120 s, and say that it is unable to open the file."""
    path = tmp_path.joinpath(*["long" * 25] * 6, "new.db")
    with pytest.raises(DatabaseError, match=r"cannot be opened: unable to open database file .sqlite opens paths of"):
        check_database(path, owner)
    check_database(tmp_path.joinpath(*["long" * 25] * 3, "new.db"), owner)


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    """On a file system that can only be read."""
    with small_disk(tmp_path / "disk") as disk:
        mount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(mount, check=True)
        with pytest.raises(DatabaseError, match=r"cannot be opened: .*\. Set FINETUNE_DATA_ROOT to another folder"):
            check_database(disk / "new.db", PREFECT)


def test_a_whole_database_passes(root: Path) -> None:
    """And so does an empty file, or none."""
    check_database(root / "mlflow" / "mlflow.db", MLFLOW)
    (root / "empty.db").touch()
    check_database(root / "empty.db", MLFLOW)
    check_database(root / "new folder" / "new.db", MLFLOW)
    assert not list((root / "new folder").iterdir())


NEWER = "a newer {} made the database {}, with the schema ffffffffffff: install that version, or move it away"


def _set_revision(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("DELETE FROM alembic_version")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))


@pytest.mark.parametrize(
    ("name", "owner", "revision", "complaint"),
    [
        (
            "mlflow",
            MLFLOW,
            "451aebb31d03",
            "was made by an older MLflow: copy the file, then run `mlflow db upgrade sq",
        ),
        ("mlflow", MLFLOW, "ffffffffffff", NEWER),
        ("prefect", PREFECT, "ffffffffffff", NEWER),
    ],
)
def test_a_database_of_another_version(root: Path, name: str, owner: str, revision: str, complaint: str) -> None:
    """An older one can be upgraded; for a newer one the sentence has two remedies."""
    path = root / name / f"{name}.db"
    _set_revision(path, revision)
    for check in (check_database, lambda path, owner: check_address(f"sqlite:///{path}", owner)):
        with pytest.raises(DatabaseError) as caught:
            check(path, owner)
        assert complaint.format(owner, path) in str(caught.value)


def test_an_older_database_of_prefect_passes(root: Path) -> None:
    """Prefect upgrades it when its server starts."""
    path = root / "prefect" / "prefect.db"
    _set_revision(path, "9725c1cbee35")
    check_database(path, PREFECT)


@pytest.mark.parametrize(
    "address", ["sqlite+aiosqlite:////{}?timeout=60", "sqlite:////{}", "mysql://h/x", "sqlite:///:memory:"]
)
def test_addresses_of_databases(root: Path, address: str) -> None:
    """Files of sqlite are looked at, whatever the driver; tests/ops/stack/test_postgres.py has PostgreSQL."""
    path = root / "mlflow" / "mlflow.db"
    path.write_bytes(b"x" * 5000)
    address = address.format(str(path).lstrip("/"))
    if str(path) in address:
        with pytest.raises(DatabaseError, match="is damaged"):
            check_address(address, PREFECT)
    else:
        check_address(address, PREFECT)


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(DatabaseError, match="takes no connection") as caught:
        check_address("postgresql+asyncpg://me:p4ssw0rd@127.0.0.1:9/x", PREFECT)
    assert str(caught.value).startswith("Prefect's database postgresql+asyncpg://127.0.0.1:9/x ")
    assert "p4ssw0rd" not in str(caught.value)


@pytest.mark.slow
def test_a_run_ends_at_a_newer_database_of_prefect(root: Path) -> None:
    """Not after the 120 s that a server may take to start."""
    _set_revision(root / "prefect" / "prefect.db", "ffffffffffff")
    error, seconds = _refused(root)
    print(f"{seconds:.1f} s: {error}")
    assert re.fullmatch(r"\d\d:\d\d:\d\d importing torch and Prefect[^\n]*\n[^\n]+\n", error)
    assert "a newer Prefect made the database" in error
    assert seconds < 10


DAMAGED = ("prefect/prefect.db", "mlflow.db", "basic_auth.db")


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_make_up_ends_at_a_damaged_database(tmp_path: Path, name: str) -> None:
    """One sentence within 10 s, and no process is left."""
    made = MadeUp(tmp_path, FINETUNE_SECURE="1")
    (made.home / name).parent.mkdir(parents=True)
    (made.home / name).write_bytes(b"x" * 5000)
    began = time.monotonic()
    try:
        made.begin()
        assert made.process
        assert made.process.wait(60) != 0
        seconds = time.monotonic() - began
        lines = [line for line in made.output.splitlines() if not line.startswith("make")]
        print(f"{seconds:.1f} s: {lines}")
        assert len(lines) == 1
        assert f"database {made.home / name} is damaged" in lines[0]
        assert seconds < 10
    finally:
        made.stop()


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
