"""Workers on two machines with PostgreSQL and an S3-compatible store: what one trains, the other reads and promotes.

A machine here is a worker with a host name, process ids, a data root and locks of its own. Both have the machine-id
of this one, as machines that were set up from one image do. They share no folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Run
from installation import Installation, installed
from made_up import BIN
from object_store import BUCKET, PASSWORD, client, object_store
from postgresql import PASSWORD as DATABASE_PASSWORD
from postgresql import postgresql

from ops.tracking import connection

pytestmark = pytest.mark.slow
MODEL = "gpt2-code-tiny"
SHORT = ("eval_freq=20", "eval_rows=60", "score_rows=60", "sample_rows=1", "pass_rows=0", "max_new_tokens=4")
MACHINES = ("machine-a", "machine-b")


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="store-") as folder, object_store(Path(folder)) as variables:
        yield variables


@pytest.fixture(scope="module", params=["through MLflow's server", "by every machine itself"])
def servers(
    request: pytest.FixtureRequest, store: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Both servers on PostgreSQL. Artifacts pass through MLflow's server, or machines reach the store themselves."""
    if os.getuid() != 0:
        pytest.skip("a host name of its own needs root")
    proxied = request.param.startswith("through")
    where = f"s3://{BUCKET}/{'proxied' if proxied else 'direct'}"
    artifacts = {"MLFLOW_ARTIFACTS_DESTINATION": where, **store}
    if not proxied:
        artifacts = {"MLFLOW_SERVE_ARTIFACTS": "false", "MLFLOW_DEFAULT_ARTIFACT_ROOT": where}
    with postgresql() as database:
        database_of_prefect = f"postgresql+asyncpg://{database}/prefect"
        with installed(
            tmp_path_factory.mktemp("servers"),
            worker=False,
            mlflow={"MLFLOW_BACKEND_STORE_URI": f"postgresql://{database}/mlflow", **artifacts},
            FINETUNE_GPUS="2",
            OMP_NUM_THREADS="1",
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30",  # as `make worker` sets it; without heartbeats a run crashes
            PREFECT_SERVER_DATABASE_CONNECTION_URL=database_of_prefect,
            **({} if proxied else store),
        ) as installation:
            yield installation


def _of(machine: str, servers: Installation) -> dict[str, str]:
    """The environment of a machine: the addresses of the servers, and folders of its own."""
    hidden = ("PREFECT_SERVER_DATABASE_CONNECTION_URL",)
    folder = servers.base / machine
    return {name: value for name, value in servers.environment.items() if name not in hidden} | {
        "FINETUNE_DATA_ROOT": str(folder / "data"),
        "FINETUNE_LOCKS": str(folder / "locks"),
        "PREFECT_HOME": str(folder / "prefect"),
    }


def _start_worker(machine: str, servers: Installation) -> subprocess.Popen[bytes]:
    """A worker that takes one run at a time, in namespaces of its own, which end with it."""
    own = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    worker = f"hostname {machine}; exec {BIN}/prefect worker start --pool gpu --limit 1 --name {machine}"
    with (servers.base / f"{machine}.log").open("wb") as log:
        return subprocess.Popen(
            [*own, worker],
            cwd=servers.cwd,
            env=_of(machine, servers),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill it, and with it all processes of its namespace."""
    worker.kill()
    worker.wait(timeout=60)


def _worker(run: Run) -> str:
    """The worker that took a run."""
    return str(run.prefect["labels"]["prefect.worker.name"])


def _champion(servers: Installation) -> str:
    """The version that is champion."""
    return str(connection.client(servers.tracking).get_registered_model(MODEL).aliases["champion"])


def _finish(servers: Installation, started: subprocess.Popen[str]) -> Run:
    """The flow run of a `prefect deployment run --watch`, which must have completed."""
    said, _ = started.communicate(timeout=600)
    run = Run(servers, said.split("UUID: ")[1].split()[0])
    logs = "".join((servers.base / f"{machine}.log").read_text()[-3000:] for machine in MACHINES)
    assert run.state["type"] == "COMPLETED", said[-1000:] + logs
    return run


def _call(machine: str, servers: Installation, *command: str) -> str:
    """Run a module's command line on a machine. Returns the output."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=servers.cwd, env=_of(machine, servers), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_what_one_machine_trains_the_other_reads(servers: Installation, store: dict[str, str]) -> None:
    workers = {machine: _start_worker(machine, servers) for machine in MACHINES}
    try:
        # Two runs at a time, one on each machine. Then a run of one starts from what the other has made champion.
        started = [servers.run(*SHORT, "max_steps=40", f"learning_rate={rate}") for rate in ("0.003", "0.001")]
        first, second = [_finish(servers, process) for process in started]
        assert {_worker(first), _worker(second)} == set(MACHINES)
        third = _finish(servers, servers.run(*SHORT, "max_steps=60", "promote=true"))
        assert _champion(servers) == "3"
        _end(workers.pop(_worker(third)))
        fourth = _finish(servers, servers.run(*SHORT, "max_steps=40", "start_from=champion", "promote=true"))
        assert {_worker(third), _worker(fourth)} == set(MACHINES)
    finally:
        for worker in workers.values():
            _end(worker)
    assert third.process.host == _worker(third)
    assert [run.mlflow.info.status for run in (first, second, third, fourth)] == ["FINISHED"] * 4
    assert fourth.mlflow.data.params["start_from"] == "champion"
    assert _champion(servers) in {"3", "4"}

    # A machine that has trained nothing reads all of it: the model, the report, the comparison.
    said = _call("machine-c", servers, "ops.tracking.sample", "Write a function.", "--max-new-tokens", "4")
    assert f"{MODEL} version 4" in said
    copy = str(servers.base / "copy")
    _call("machine-c", servers, "ops.tracking.export", "--directory", copy, f"models:/{MODEL}@champion")
    assert Path(copy, "model.safetensors").stat().st_size > 10_000_000
    assert "learning_rate" in _call(
        "machine-c", servers, "ops.tracking.compare", first.mlflow.info.run_id, second.mlflow.info.run_id
    )
    _call("machine-c", servers, "ops.tracking.report", third.mlflow.info.run_id)

    # It is all in the store and the databases, and no password is anywhere but there.
    prefix = f"{'direct' if PASSWORD in servers.environment.values() else 'proxied'}/"
    found = client(store).list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    assert sum(each["Key"].endswith("model.safetensors") for each in found) >= 4
    assert not (servers.base / "artifacts").exists()
    assert not list(servers.base.rglob("mlflow.db"))
    logs = b"".join(path.read_bytes() for path in servers.base.glob("*.log"))
    assert PASSWORD.encode() not in logs
    assert DATABASE_PASSWORD.encode() not in logs
