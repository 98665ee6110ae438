"""A temporary PostgreSQL server for tests, where Debian's package postgresql is installed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_up import free_ports

PASSWORD = "postgres-secret"


def _binaries() -> Path:
    """The folder of PostgreSQL's programs, which on Debian is not in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(found[-1]) if found else None)
    if not program:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    if not importlib.util.find_spec("psycopg2"):
        pytest.skip("psycopg2 is not installed (pip install -c constraints.txt -e '.[postgres]')")
    return Path(program).resolve().parent


@contextmanager
def postgresql(encoding: str = "UTF8") -> Iterator[str]:
    """A temporary cluster on the loopback, with the databases prefect and mlflow.

    Yields:
        User, password, host and port, as they stand in an address.
    """
    binaries = _binaries()
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "password").write_text(PASSWORD)
        user = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            for path in (base, base / "password"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
            user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

        def call(program: str, *arguments: str) -> None:
            command = [str(binaries / program), *arguments]
            environment = {"PATH": os.defpath, "PGPASSWORD": PASSWORD, "LC_ALL": "C"}
            done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, **user)
            assert done.returncode == 0, done.stdout + done.stderr

        data = str(base / "data")
        call("initdb", "-D", data, "-U", "finetune", "--auth=scram-sha-256", f"--pwfile={base / 'password'}")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        call("pg_ctl", "-D", data, "-w", "-l", str(base / "log"), "-o", options, "start")
        try:
            for name in ("prefect", "mlflow"):
                address = ("-h", "127.0.0.1", "-p", str(port), "-U", "finetune")
                call("createdb", *address, "--template", "template0", "--encoding", encoding, name)
            yield f"finetune:{PASSWORD}@127.0.0.1:{port}"
        finally:
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
