"""Looks at the databases of Prefect and MLflow before a server opens them: what is wrong is one sentence.

A server that cannot open its database says so in a traceback in its log, and whoever waits for it waits two minutes.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import sqlite3
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ops.redaction import redact, without_credentials
from ops.text import one_line

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_LOCK_SECONDS = 5.0  # a transaction of another process may take that long
_CHECK_SECONDS = 2.0  # a large database is checked in part
_LONGEST_PATH = 500  # bytes; 512 with what sqlite appends
_FREE_BYTES = 8_000_000  # two new databases
_CONNECT_SECONDS = 10.0  # to a PostgreSQL server
PREFECT, MLFLOW = "Prefect", "MLflow"
_SETTINGS = {
    PREFECT: "set PREFECT_SERVER_DATABASE_CONNECTION_URL to another",
    MLFLOW: "set MLFLOW_TRACKING_URI to another, or leave it out",
}
# Folders of the migrations, in the package of each.
_MIGRATIONS = {
    PREFECT: "server/database/_migrations/versions/sqlite",
    MLFLOW: "store/db_migrations/versions",
}
_REVISIONS = re.compile(r"""^(down_)?revision\b[^=\n]*=\s*["'](\w+)["']""", re.MULTILINE)


class DatabaseError(RuntimeError):
    """A database cannot be used; the message has the remedy."""


def check_database(path: Path, owner: str) -> None:
    """Check that a database can be read and written; one that does not exist yet needs room only.

    Args:
        owner: PREFECT or MLFLOW.

    Raises:
        DatabaseError: it is damaged, locked, not writable, or of another version, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < _FREE_BYTES:
        raise DatabaseError(
            f"the disk of {path} is full, {free:,} bytes are free and {owner} needs {_FREE_BYTES:,}: free some, or "
            "set FINETUNE_DATA_ROOT to another disk"
        )
    try:
        if not path.exists():
            return _probe_new(path)
        _probe(path)
        revision = _read_revision(path)
    except sqlite3.Error as error:
        raise DatabaseError(_explain(path, owner, error)) from error
    if revision:
        _check_revision(path, owner, revision)


def look_at(address: str, owner: str) -> None:
    """As ``check_address``, for a sqlite database that exists, but quick: nothing is locked, and few pages are read.

    Raises:
        DatabaseError: it is no database, locked, or of another version.
    """
    path = sqlite_path(address)
    if path is None or not path.is_file() or not path.stat().st_size:
        return
    try:
        revision = _read_revision(path)
    except sqlite3.Error as error:
        raise DatabaseError(_explain(path, owner, error)) from error
    if revision:
        _check_revision(path, owner, revision)


def unusable(address: str, owner: str, error: BaseException) -> DatabaseError:
    """The error that a database cannot be used, for a reason that a library gives."""
    path = sqlite_path(address)
    remedy = _put_aside(path, "damaged") if path and path.exists() else _SETTINGS[owner]
    reason = redact(one_line(error))[:300] or type(error).__name__
    return DatabaseError(f"{owner}'s database {without_credentials(address)} cannot be used ({reason}): {remedy}")


def is_absent(address: str) -> bool:
    """Whether it is the address of a sqlite file that does not exist; a client would make an empty one."""
    path = sqlite_path(address)
    return path is not None and not path.exists()


def sqlite_path(address: str) -> Path | None:
    """The file of an address; None if it is a server's or in memory."""
    scheme, _, path = address.partition(":///")
    if scheme.partition("+")[0] != "sqlite" or not path or path.startswith((":memory:", "file:")):
        return None
    return Path(path.partition("?")[0])


def _put_aside(path: Path, word: str) -> str:
    """What to do with a database that nothing can read any more."""
    aside = shlex.join(["mv", str(path), f"{path}.{word}"])
    return f"move it away, and a new one is made, without the earlier runs: `{aside}`"


def check_address(address: str, owner: str) -> None:
    """As ``check_database``, for the address that a server gets: of a sqlite file, or of a PostgreSQL server.

    Args:
        address: such as sqlite:////folder/file, sqlite+aiosqlite:////folder/file or postgresql://user@host/name.
    """
    if address.partition("://")[0].partition("+")[0] == "postgresql":
        return check_postgresql(address, owner)
    if path := sqlite_path(address):
        check_database(path, owner)


def check_postgresql(address: str, owner: str) -> None:
    """Check that the driver is installed, the database takes a connection, and it can store any text.

    Raises:
        DatabaseError: one of these is not so.
    """
    from sqlalchemy.engine import make_url  # here: `make run` has no use for it

    where = f"{owner}'s database {without_credentials(address)}"
    url = make_url(address)
    if url.get_backend_name() == address.partition("://")[0] and not find_spec("psycopg2"):
        raise DatabaseError(
            f"{where} needs the driver psycopg2: install it with "
            "`.venv/bin/pip install -c constraints.txt -e '.[dev,postgres]'`"
        )
    if not url.host or "," in url.host:  # a socket, or several servers: the driver alone knows how
        return
    try:
        encoding = asyncio.run(_read_encoding(url))
    except Exception as error:  # asyncpg raises its own, OSError and TimeoutError
        reason = redact(one_line(error)) or type(error).__name__
        raise DatabaseError(f"{where} takes no connection: {reason[:300]}") from error
    if encoding != "UTF8":
        create = f"createdb --template template0 --encoding UTF8 {shlex.quote(url.database or '')}"
        raise DatabaseError(
            f"{where} has the encoding {encoding} and cannot store every text: create an empty one in its place with "
            f"`{create}`"
        )


async def _read_encoding(url: URL) -> str:
    import asyncpg

    secured = url.query.get("ssl") or url.query.get("sslmode")
    connection = await asyncpg.connect(
        host=url.host, port=url.port or 5432, user=url.username, password=url.password, database=url.database,
        ssl=secured or None, timeout=_CONNECT_SECONDS,
    )  # fmt: skip
    try:
        return str(await connection.fetchval("SHOW server_encoding"))
    finally:
        await connection.close()


def _probe_new(path: Path) -> None:
    """Begin to make a database, and undo it.

    Raises:
        sqlite3.Error: its folder takes none, or its path is too long for sqlite.
    """
    address = f"file:{quote(str(path))}?mode=rwc"
    with closing(sqlite3.connect(address, uri=True, timeout=_LOCK_SECONDS, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE probe (x)")
        connection.execute("ROLLBACK")
    if path.stat().st_size == 0:
        path.unlink()


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


def _read_revision(path: Path) -> str | None:
    """The schema that a database has, as alembic records it; None in a new one."""
    address = f"file:{quote(str(path))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=_LOCK_SECONDS)) as connection:
        table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if table else None
        return str(row[0]) if row else None


def _check_revision(path: Path, owner: str, revision: str) -> None:
    """Compare a database's schema with those that the installed package has. Prefect upgrades an older one itself.

    Raises:
        DatabaseError: it was made by a newer version, or by an older MLflow.
    """
    package = find_spec(owner.lower())
    assert package
    assert package.origin
    known: set[str] = set()
    superseded: set[str] = set()
    for migration in (Path(package.origin).parent / _MIGRATIONS[owner]).glob("*.py"):
        for down, name in _REVISIONS.findall(migration.read_text()):
            (superseded if down else known).add(name)
    if revision not in known:
        raise DatabaseError(
            f"a newer {owner} made the database {path}, with the schema {revision}: install that version, or "
            f"{_put_aside(path, 'newer')}"
        )
    if owner == MLFLOW and revision in superseded:
        upgrade = shlex.join(["mlflow", "db", "upgrade", f"sqlite:///{path}"])
        raise DatabaseError(f"{path} was made by an older MLflow: copy the file, then run `{upgrade}`")


def _explain(path: Path, owner: str, error: sqlite3.Error) -> str:
    reason = one_line(error)
    if "locked" in reason or "busy" in reason:
        holder = shlex.join(["fuser", str(path)])
        return f"{owner}'s database {path} is locked by another process (`{holder}` names it): wait for it, or end it"
    if isinstance(error, sqlite3.OperationalError):  # no permission, no file, or too long
        if len(os.fsencode(path)) > _LONGEST_PATH:
            reason += f" (sqlite opens paths of about {_LONGEST_PATH} bytes; this one is longer)"
        return f"{owner}'s database {path} cannot be opened: {reason}. Set FINETUNE_DATA_ROOT to another folder"
    return f"{owner}'s database {path} is damaged ({reason}): restore a copy of it, or {_put_aside(path, 'damaged')}"
