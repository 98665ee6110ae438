"""The deployments as users meet them: real servers, a worker, ``make deploy``, ``prefect deployment run``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from ops.tracking import client

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
FEW_STEPS = ["max_steps=40", "eval_freq=20", "sample_rows=1", "max_new_tokens=4"]


@dataclass(frozen=True)
class Platform:
    """Two servers and a worker, started in a directory that has nothing to do with the checkout."""

    cwd: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]]

    @property
    def tracking(self) -> str:
        return self.environment["MLFLOW_TRACKING_URI"]

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's REST API."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.environment["PREFECT_API_URL"] + path, data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def start(self, *command: str, **environment: str) -> Path:
        """Start a process that stays, and return the path of its output."""
        log = self.cwd.with_name(f"{command[0]}-{command[1]}.log")
        with log.open("wb") as stream:
            self.processes.append(
                subprocess.Popen(
                    [str(BIN / command[0]), *command[1:]],
                    cwd=self.cwd,
                    env=self.environment | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return log

    def command(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that ends."""
        return subprocess.Popen(
            command, cwd=self.cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def deploy(self) -> str:
        """``make deploy``, from another directory, with this interpreter's environment as the installed one."""
        made = self.command("make", "-C", str(ROOT), "-o", ".venv/.installed", f"BIN={BIN}", "deploy")
        output, _ = made.communicate(timeout=120)
        assert made.returncode == 0, output[-3000:]
        return output

    def run(self, *parameters: str) -> subprocess.Popen[str]:
        """``prefect deployment run finetune/tiny -p ... --watch``."""
        options = [option for parameter in parameters for option in ("-p", parameter)]
        return self.command(str(BIN / "prefect"), "deployment", "run", "finetune/tiny", *options, "--watch")

    def stop(self) -> None:
        """End what was started and all that it started: a flow run would outlive its worker."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _wait("the end of every process", lambda: not self.descendants(), 10)

    def descendants(self) -> list[int]:
        """Whoever has this platform's PREFECT_HOME in its environment."""
        mark = f"PREFECT_HOME={self.environment['PREFECT_HOME']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # another user's, or gone
                continue
        return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(what: str, ready: Callable[[], Any], seconds: float) -> Any:
    """Poll until something truthy comes back; to be refused a connection counts as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := ready():
                return answer
        except OSError:
            pass
        time.sleep(0.25)
    raise AssertionError(f"{what} did not come in {seconds:g} s")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A fresh installation: both servers up, everything deployed, one worker. All of it is gone afterwards."""
    base = tmp_path_factory.mktemp("platform")
    cwd = base / "elsewhere"
    cwd.mkdir()
    prefect_port, mlflow_port = _free_port(), _free_port()
    foreign = ("PREFECT_", "MLFLOW_", "FINETUNE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "DO_NOT_TRACK": "true",
        "FINETUNE_DATA_ROOT": str(base / "data"),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "PREFECT_HOME": str(base / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Ask twice in a second, not every ten, whether there is a run to start.
        "PREFECT_WORKER_QUERY_SECONDS": "0.5",
    }
    started = Platform(cwd, environment, [])
    try:
        started.start(
            "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port),
            PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS="1",
        )  # fmt: skip
        started.start(
            "mlflow", "--env-file", str(ROOT / "mlflow" / "server.env"), "server",
            MLFLOW_PORT=str(mlflow_port),
            MLFLOW_BACKEND_STORE_URI=f"sqlite:///{base}/mlflow.db",
            MLFLOW_ARTIFACTS_DESTINATION=str(base / "artifacts"),
        )  # fmt: skip
        _wait("Prefect's server", lambda: started.api("/health"), 90)
        _wait("MLflow's server", lambda: urlopen(started.tracking + "/health", timeout=5).status == 200, 90)
        started.deploy()
        started.start("prefect", "worker", "start", "--pool", "gpu")
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def deployments(platform: Platform) -> dict[str, dict[str, Any]]:
    """What the server knows of each deployment, by name."""
    return {deployment["name"]: deployment for deployment in platform.api("/deployments/filter", {})}


def test_deployments_are_those_of_prefect_yaml(deployments: dict[str, dict[str, Any]]) -> None:
    written = {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}

    assert set(deployments) == set(written) == {"tiny", "124m", "355m", "774m", "1558m", "nightly"}
    for name, deployment in deployments.items():
        assert deployment["parameters"] == written[name]["parameters"]
        assert deployment["description"] == written[name]["description"]
        assert deployment["job_variables"] == {"stream_output": False}
        assert deployment["work_pool_name"] == "gpu"
        assert deployment["entrypoint"] == "flows.finetune.finetune"
        assert all(field["description"] for field in deployment["parameter_openapi_schema"]["properties"].values())


def test_no_path_of_the_deploying_machine_is_stored(
    platform: Platform, deployments: dict[str, dict[str, Any]]
) -> None:
    stored = json.dumps([deployments, platform.api("/work_pools/gpu")])

    for path in (ROOT, platform.cwd.parent):
        assert str(path) not in stored


def test_deploying_again_changes_nothing(platform: Platform, deployments: dict[str, dict[str, Any]]) -> None:
    platform.deploy()

    ids = {deployment["name"]: deployment["id"] for deployment in platform.api("/deployments/filter", {})}
    assert ids == {name: deployment["id"] for name, deployment in deployments.items()}
    assert platform.api("/v2/concurrency_limits/tag:gpu")["limit"] == 1


def test_nightly_is_scheduled_at_two_utc(platform: Platform, deployments: dict[str, dict[str, Any]]) -> None:
    """The schedule is stored, and the server acts on it: runs of the coming nights are planned."""
    (schedule,) = deployments["nightly"]["schedules"]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 2 * * *", "UTC")

    nightly = {"deployments": {"id": {"any_": [deployments["nightly"]["id"]]}}}
    runs = _wait("a scheduled run", lambda: platform.api("/flow_runs/filter", nightly), 75)
    for run in runs:
        assert run["state"]["type"] == "SCHEDULED"
        start = _time(run["expected_start_time"])
        assert start.utcoffset().total_seconds() == 0
        assert (start.hour, start.minute) == (2, 0)


@pytest.mark.parametrize(
    ("parameter", "complaint"), [("epochs=0", "epochs"), ("top_p=2", "top_p"), ("nonsense=1", "nonsense")]
)
def test_a_wrong_parameter_is_refused_at_once(platform: Platform, parameter: str, complaint: str) -> None:
    refused = platform.run(parameter)
    output, _ = refused.communicate(timeout=60)

    assert refused.returncode != 0
    assert complaint in output
    assert "UUID" not in output  # no flow run came into being


def test_two_runs_take_turns_and_leave_everything_behind(platform: Platform) -> None:
    """Both end Completed, one training after the other, each with its MLflow run and its registered version."""
    submitted = [platform.run(*FEW_STEPS, f"seed={seed}") for seed in (1, 2)]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in submitted]
    finally:
        for process in submitted:
            process.kill()
    ids = []
    for process, output in zip(submitted, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        found = re.search(r"UUID: (\S+)", output)
        assert found
        ids.append(found[1])

    mlflow = client(platform.tracking)
    experiment = mlflow.get_experiment_by_name("finetune")
    versions = []
    for flow_run in ids:
        assert platform.api(f"/flow_runs/{flow_run}")["state"]["type"] == "COMPLETED"
        (run,) = mlflow.search_runs([experiment.experiment_id], f"tags.`prefect.flow_run_id` = '{flow_run}'")
        assert run.info.status == "FINISHED"
        assert run.data.tags["prefect.deployment"] == "tiny"
        assert flow_run in run.data.tags["prefect.flow_run_url"]
        assert run.data.params["total_steps"] == "40"
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        (version,) = mlflow.search_model_versions(f"run_id = '{run.info.run_id}'")
        versions.append(version.version)
        of_this_run = {"artifacts": {"flow_run_id": {"any_": [flow_run]}, "key": {"any_": ["samples"]}}}
        (samples,) = platform.api("/artifacts/filter", of_this_run)
        assert run.info.run_id in samples["data"]
    assert sorted(versions) == ["1", "2"]

    tasks = platform.api("/task_runs/filter", {"flow_runs": {"id": {"any_": ids}}})
    trainings = sorted(
        (_time(t["start_time"]), _time(t["end_time"])) for t in tasks if t["name"].startswith("train-")
    )
    assert len(trainings) == 2
    assert trainings[0][1] <= trainings[1][0]
    # They did meet: the second flow run was under way before the first had trained.
    assert max(_time(platform.api(f"/flow_runs/{i}")["start_time"]) for i in ids) < trainings[0][1]
    assert list(platform.cwd.iterdir()) == []  # nothing is written where the worker happens to run
