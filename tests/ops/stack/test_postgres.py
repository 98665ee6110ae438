"""``make up`` on PostgreSQL: both servers and a run, with the URLs of docs/operations.md; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import MadeUp, free_ports
from postgresql import PASSWORD, postgresql

from ops import databases
from ops.databases import MLFLOW, PREFECT, DatabaseError, check_address

pytestmark = pytest.mark.slow
FEW_STEPS = ("max_steps=4", "eval_freq=2", "sample_rows=1", "pass_rows=1", "max_new_tokens=4")


def test_both_servers_and_a_run_on_postgresql(tmp_path: Path) -> None:
    import psycopg2

    with postgresql() as server:
        up = MadeUp(
            tmp_path,
            MLFLOW_BACKEND_STORE_URI=f"postgresql://{server}/mlflow",
            PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{server}/prefect",
        )
        try:
            up.start()
            output, _ = up.run(*FEW_STEPS).communicate(timeout=240)
            assert up.api(f"/flow_runs/{up.flow_run(output)}")["state"]["type"] == "COMPLETED", output[-3000:]
            with psycopg2.connect(f"postgresql://{server}/mlflow") as connection, connection.cursor() as cursor:
                cursor.execute("select status from runs")
                assert cursor.fetchall() == [("FINISHED",)]
            assert list(up.home.rglob("*.db")) == []  # no sqlite database was made
            logs = b"".join(path.read_bytes() for path in up.home.rglob("*.log"))
            assert PASSWORD.encode() not in logs
        finally:
            up.stop()


def test_what_is_wrong_with_an_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoding, the password, the name of the database, the port, the driver; no message has the password."""
    with postgresql(encoding="SQL_ASCII") as server:
        host = server.rpartition("@")[2]
        (port,) = free_ports(1)
        wrong = {
            f"postgresql://{server}/mlflow": "createdb --template template0 --encoding UTF8 mlflow",
            f"postgresql+asyncpg://{server}/prefect": "createdb --template template0 --encoding UTF8 prefect",
            f"postgresql://finetune:an0ther-secret@{host}/mlflow": "password authentication failed",
            f"postgresql://{server}/other": '"other" does not exist',
            f"postgresql://finetune:{PASSWORD}@127.0.0.1:{port}/mlflow": "takes no connection",
        }
        for address, said in wrong.items():
            owner = PREFECT if "asyncpg" in address else MLFLOW
            with pytest.raises(DatabaseError, match=f"^{owner}'s database postgresql") as caught:
                check_address(address, owner)
            assert said in str(caught.value)
            assert "secret" not in str(caught.value)
            assert "\n" not in str(caught.value)
    monkeypatch.setattr(databases, "find_spec", lambda name: None)
    with pytest.raises(DatabaseError, match="needs the driver psycopg2: install it"):
        check_address(f"postgresql://{server}/mlflow", MLFLOW)
