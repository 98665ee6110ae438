"""Access to MLflow: databases that cannot be used, servers that do not answer, and no database yet."""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from flows.__main__ import main
from ops.databases import DatabaseError
from ops.tracking.connection import client, refusal, require_runs


def test_a_database_that_cannot_be_used_is_one_sentence(tmp_path: Path, mlflow_database: Path) -> None:
    """Of any command that opens MLflow: it names the file and what to do, where MLflow raises errors of its own."""
    damaged, older, foreign = (tmp_path / f"{name}.db" for name in ("damaged", "older", "foreign"))
    damaged.write_bytes(b"x" * 5000)
    shutil.copy(mlflow_database, older)
    with closing(sqlite3.connect(older)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("CREATE TABLE experiments (x)")
    for path, said in (
        (damaged, f"MLflow's database {damaged} is damaged (file is not a database): restore a copy of it, or move"),
        (
            older,
            f"{older} was made by an older MLflow: copy the file, then run `mlflow db upgrade sqlite:///{older}`",
        ),
        (foreign, f"MLflow's database sqlite:///{foreign} cannot be used ("),
    ):
        content = path.read_bytes()
        with pytest.raises(DatabaseError, match=f"^{re.escape(said)}"):
            client(f"sqlite:///{path}")
        if path != foreign:
            assert path.read_bytes() == content, "it is not upgraded in passing"


def test_a_locked_database_is_one_sentence(
    tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process holds it, for longer than a transaction takes."""
    monkeypatch.setattr("ops.databases._LOCK_SECONDS", 0.1)
    path = Path(shutil.copy(mlflow_database, tmp_path))
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseError, match=f"^MLflow's database {path} is locked by another process"):
            client(f"sqlite:///{path}")
        holder.execute("ROLLBACK")
    client(f"sqlite:///{path}").search_experiments()


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "hi"],
        ["report", "models:/gpt2-code-tiny/1"],
        ["compare", "models:/gpt2-code-tiny/1", "models:/gpt2-code-tiny/2"],
        ["export", "models:/gpt2-code-tiny/1", "--gguf", "x.gguf"],
        ["rollback", "tiny"],
    ],
)
def test_before_the_first_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that read say what to do, and make no database."""
    root = tmp_path / "root"
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(words) == 2
    said = (
        f"there is no run yet, sqlite:///{root}/mlflow/mlflow.db does not exist: run `make run` first, or set MLFLOW"
    )
    assert capsys.readouterr().err.startswith(said)
    assert not root.exists()


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    """The innermost reason; those of requests and urllib3 show the whole request."""
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("HTTPConnectionPool(...): Max retries exceeded with url: ...") from error
    except RuntimeError as error:
        told = refusal("http://u:secret@host:5000", error)
    assert told.endswith(
        "host:5000 does not answer (Connection refused): start it, or set MLFLOW_TRACKING_URI to its address"
    )
    assert "secret" not in told
    assert refusal("http://host", RuntimeError("one\ntwo")).endswith(
        "refuses (MLFLOW_TRACKING_URI names it): one two"
    )


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (TimeoutError("timed out"), "does not answer (timed out)"),
        (OSError(113, "No route to host"), "does not answer (No route to host)"),
        (FileNotFoundError(2, "No such file or directory", "/artifacts/a"), "refuses"),
        (PermissionError(13, "Permission denied", "/artifacts/a"), "refuses"),
    ],
)
def test_a_server_without_an_answer_is_told_from_one_that_refuses(cause: OSError, said: str) -> None:
    """A file that cannot be read says nothing of the server."""
    error = RuntimeError("the request failed")
    error.__cause__ = cause
    assert f"http://host {said}" in refusal("http://host", error)


@pytest.mark.parametrize("address", ["sqlite:///{}", "sqlite+pysqlite:///{}", "sqlite:///{}?timeout=10"])
def test_a_database_is_known_by_its_file(address: str, tmp_path: Path) -> None:
    """Whatever driver or options the address has."""
    uri = address.format(tmp_path / "mlflow.db")
    with pytest.raises(LookupError, match="there is no run yet"):
        require_runs(uri)
    (tmp_path / "mlflow.db").touch()
    require_runs(uri)
