"""``make up SECURE=1``: requests need the password, a run completes, and the password is stored nowhere else."""

from __future__ import annotations

import base64
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from made_up import MAKE, MadeUp, made_up

pytestmark = pytest.mark.slow
FEW_STEPS = ("max_steps=4", "eval_freq=2", "sample_rows=1", "pass_rows=1", "max_new_tokens=4")
EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"
CANARY = "canary-5d41402abc4b2a76"  # a secret in the environment of make up, such as a cloud's key


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUp]:
    with made_up(tmp_path_factory.mktemp("secured"), FINETUNE_SECURE="1", AWS_SECRET_ACCESS_KEY=CANARY) as made:
        yield made


def _status(url: str, credentials: str | None = None, **headers: str) -> int:
    if credentials:
        headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except HTTPError as refused:
        return refused.code


def test_it_prints_the_password_file_and_not_the_password(secured: MadeUp) -> None:
    assert str(secured.home / "password") in secured.output
    for name in ("password", "client.env"):
        assert stat.S_IMODE((secured.home / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("credentials", [None, "admin:wrong", "somebody:{password}"])
def test_without_credentials_every_request_is_refused(credentials: str | None, secured: MadeUp) -> None:
    wrong = credentials and credentials.format(password=secured.password)
    urls = [secured.mlflow + EXPERIMENTS, secured.mlflow + "/", secured.prefect + "/api/admin/settings"]
    for url in urls:
        assert _status(url, wrong) == 401
        assert _status(url, f"admin:{secured.password}") == 200


@pytest.mark.parametrize("command", ["doctor", "deploy"])
def test_without_the_password_a_command_names_its_file(command: str, secured: MadeUp) -> None:
    environment = secured.environment | {"PREFECT_API_URL": f"{secured.prefect}/api"}
    done = subprocess.run([*MAKE, command], env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count(f"requires a password: run `. {secured.home}/client.env` first") == (
        2 if command == "doctor" else 1
    )
    assert "Traceback" not in said


def test_a_foreign_host_header(secured: MadeUp) -> None:
    """Both servers refuse it, even with the password."""
    right = f"admin:{secured.password}"
    assert _status(secured.mlflow + EXPERIMENTS, right, Host="evil.example") == 403
    assert _status(secured.mlflow + EXPERIMENTS, Host="evil.example") == 403
    assert _status(secured.prefect + "/api/admin/settings", Host="evil.example") == 403
    assert _status(secured.prefect + "/api/admin/settings", right, Host="evil.example") == 403


def test_a_run_completes_and_the_secrets_are_written_nowhere(secured: MadeUp) -> None:
    """No log, database or artifact holds the password or another secret of the environment."""
    output, _ = secured.run(*FEW_STEPS).communicate(timeout=240)
    run = secured.flow_run(output)
    assert secured.api(f"/flow_runs/{run}")["state"]["type"] == "COMPLETED", output[-3000:]

    assert secured.password
    encoded = base64.b64encode(f"admin:{secured.password}".encode()).decode()
    files = [path for path in secured.home.parent.rglob("*") if path.is_file()] + [secured.log]
    assert {"prefect.db", "mlflow.db", "basic_auth.db", "prefect.log", "worker.log"} <= {p.name for p in files}
    allowed = {secured.home / "password", secured.home / "client.env"}
    for secret in (secured.password, encoded, CANARY):
        found = {path for path in files if secret.encode() in path.read_bytes()}
        assert found == (allowed if secret == secured.password else set())
        assert secret not in output
        for process in secured.processes():
            assert secret not in Path(f"/proc/{process.pid}/cmdline").read_text()


def test_a_lost_password_is_noticed(secured: MadeUp) -> None:
    """MLflow keeps the old password, so a newly made one would never be accepted."""
    secured.interrupt()
    (secured.home / "password").unlink()
    secured.begin()
    assert secured.process
    assert secured.process.wait(timeout=180) != 0
    assert "MLflow does not know the password" in secured.output
    assert "basic_auth.db" in secured.output
    assert secured.processes() == []
