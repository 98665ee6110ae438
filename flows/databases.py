"""Looks at the two sqlite databases of `make run` before anything opens them: what is wrong is one sentence."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from flows.commands import UsageError
from ops.text import one_line
from ops.tracking.provenance import is_known_schema

_LOCK_SECONDS = 5.0  # a transaction of another process may take that long
_CHECK_SECONDS = 2.0  # a large database is checked in part
_REVISION = re.compile(r"out-of-date database schema \(found version (\w+),")
_FREE_BYTES = 8_000_000  # two new databases


def check_database(path: Path, owner: str) -> None:
    """Check that a database can be read and written; one that does not exist yet needs room only.

    Args:
        owner: Prefect or MLflow.

    Raises:
        UsageError: it is damaged, locked or not writable, or the disk is full; the message has the remedy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < _FREE_BYTES:
        raise UsageError(
            f"the disk of {path} is full, {free:,} bytes are free and {owner} needs {_FREE_BYTES:,}: free some, or "
            "set FINETUNE_DATA_ROOT to another disk"
        )
    if not path.exists():
        return
    try:
        _probe(path)
    except sqlite3.Error as error:
        raise UsageError(_explain(path, owner, error)) from error


def _probe(path: Path) -> None:
    """Lock a database for writing, and check what its size allows.

    Raises:
        sqlite3.Error: something is wrong with it.
    """
    address = f"file:{quote(str(path))}?mode=rw"
    with closing(sqlite3.connect(address, uri=True, timeout=_LOCK_SECONDS, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        deadline = time.monotonic() + _CHECK_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        try:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            return
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)


def _explain(path: Path, owner: str, error: sqlite3.Error) -> str:
    reason = one_line(error)
    if "locked" in reason or "busy" in reason:
        holder = shlex.join(["fuser", str(path)])
        return f"{owner}'s database {path} is locked by another process (`{holder}` names it): wait for it, or end it"
    if isinstance(error, sqlite3.OperationalError):  # no permission, or no file
        return f"{owner}'s database {path} cannot be opened: {reason}"
    aside = shlex.join(["mv", str(path), f"{path}.damaged"])
    return (
        f"{owner}'s database {path} is damaged ({reason}): restore a copy of it, or move it away and a new one is "
        f"made, without the earlier runs: `{aside}`"
    )


def open_mlflow(uri: str) -> None:
    """Create or open MLflow's database, and look for the experiment.

    Raises:
        UsageError: it is of another version of MLflow, or the experiment was deleted.
    """
    from ops.tracking.runs import client, find_experiment  # here: they import torch, and a wrong name needs neither

    try:
        mlflow = client(uri)
        mlflow.search_experiments(max_results=1)  # creates a fresh database
        find_experiment(mlflow)
    except RuntimeError as error:  # deleted
        raise UsageError(str(error)) from error
    except Exception as error:  # MLflow, SQLAlchemy and alembic raise different ones
        reason = one_line(error)
        if found := _REVISION.search(reason):
            if is_known_schema(found[1]):
                upgrade = shlex.join(["mlflow", "db", "upgrade", uri])
                raise UsageError(f"{uri} was made by an older MLflow: copy the file, then run `{upgrade}`") from error
            reason = f"a newer MLflow made it, with the schema {found[1]}: install that one"
        raise UsageError(f"MLflow's database {uri} cannot be used: {reason[:300]}") from error
