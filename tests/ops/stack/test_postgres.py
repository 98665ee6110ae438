"""``make up`` on PostgreSQL: both servers and a run, with the URLs of docs/operations.md."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_up import MadeUp, free_ports

pytestmark = pytest.mark.slow
FEW_STEPS = ("max_steps=4", "eval_freq=2", "sample_rows=1", "pass_rows=1", "max_new_tokens=4")


def _binaries() -> Path:
    """The folder of PostgreSQL's programs, which on Debian is not in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    program = shutil.which("initdb") or (str(found[-1]) if found else None)
    if not program:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    if not importlib.util.find_spec("psycopg2"):
        pytest.skip("psycopg2 is not installed (pip install -c constraints.txt -e '.[postgres]')")
    return Path(program).resolve().parent


@pytest.fixture
def postgres() -> Iterator[str]:
    """A temporary cluster with the databases prefect and mlflow. Yields user, password, host and port."""
    binaries = _binaries()
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "password").write_text("postgres-secret")
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
            environment = {"PATH": os.defpath, "PGPASSWORD": "postgres-secret", "LC_ALL": "C"}
            done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, **user)
            assert done.returncode == 0, done.stdout + done.stderr

        data = str(base / "data")
        call("initdb", "-D", data, "-U", "finetune", "--auth=scram-sha-256", f"--pwfile={base / 'password'}")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        call("pg_ctl", "-D", data, "-w", "-l", str(base / "log"), "-o", options, "start")
        try:
            for name in ("prefect", "mlflow"):
                call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "finetune", name)
            yield f"finetune:postgres-secret@127.0.0.1:{port}"
        finally:
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


def test_both_servers_and_a_run_on_postgresql(postgres: str, tmp_path: Path) -> None:
    up = MadeUp(
        tmp_path,
        MLFLOW_BACKEND_STORE_URI=f"postgresql://{postgres}/mlflow",
        PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{postgres}/prefect",
    )
    try:
        up.start()
        output, _ = up.run(*FEW_STEPS).communicate(timeout=240)
        assert up.api(f"/flow_runs/{up.flow_run(output)}")["state"]["type"] == "COMPLETED", output[-3000:]

        import psycopg2

        with psycopg2.connect(f"postgresql://{postgres}/mlflow") as connection, connection.cursor() as cursor:
            cursor.execute("select status from runs")
            assert cursor.fetchall() == [("FINISHED",)]
        assert list(up.home.rglob("*.db")) == []  # no sqlite database was made
        logs = b"".join(path.read_bytes() for path in up.home.rglob("*.log"))
        assert b"postgres-secret" not in logs
    finally:
        up.stop()
