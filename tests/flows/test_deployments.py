"""The deployments as users meet them: real servers, a worker, ``make up``, ``prefect deployment run``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import yaml
from made_up import ROOT, MadeUp, made_up, wait_for

from ops.tracking.connection import client

pytestmark = pytest.mark.slow
FEW_STEPS = ["max_steps=40", "eval_freq=20", "sample_rows=1", "max_new_tokens=4"]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUp]:
    """A fresh installation: both servers up, everything deployed, one worker. All of it is gone afterwards."""
    with made_up(tmp_path_factory.mktemp("platform"), FINETUNE_GPUS="1") as made:
        yield made


@pytest.fixture(scope="module")
def deployments(platform: MadeUp) -> dict[str, dict[str, Any]]:
    """What the server knows of each deployment, by name."""
    return {deployment["name"]: deployment for deployment in platform.api("/deployments/filter", {})}


def test_deployments_are_those_of_prefect_yaml(deployments: dict[str, dict[str, Any]]) -> None:
    written = {d["name"]: d for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}

    assert set(deployments) == set(written) == {
        "tiny", "124m", "355m", "774m", "1558m", "sweep-tiny", "sweep-124m", "sweep-355m", "nightly",
    }  # fmt: skip
    for name, deployment in deployments.items():
        assert deployment["parameters"] == written[name]["parameters"]
        assert deployment["description"] == written[name]["description"]
        assert deployment["job_variables"] == {"stream_output": False}
        assert deployment["work_pool_name"] == "gpu"
        assert deployment["entrypoint"] == written[name]["entrypoint"]
        assert all(field["description"] for field in deployment["parameter_openapi_schema"]["properties"].values())


def test_no_path_of_the_deploying_machine_is_stored(platform: MadeUp, deployments: dict[str, dict[str, Any]]) -> None:
    stored = json.dumps([deployments, platform.api("/work_pools/gpu")])

    for path in (ROOT, platform.home.parent):
        assert str(path) not in stored


def test_deploying_again_changes_nothing(platform: MadeUp, deployments: dict[str, dict[str, Any]]) -> None:
    again = platform.make("deploy")
    assert again.returncode == 0, again.stdout

    ids = {deployment["name"]: deployment["id"] for deployment in platform.api("/deployments/filter", {})}
    assert ids == {name: deployment["id"] for name, deployment in deployments.items()}
    assert platform.api("/v2/concurrency_limits/tag:gpu")["limit"] == 1


def _nightly(platform: MadeUp, *arguments: str) -> str:
    command = [sys.executable, "-m", "ops.stack.nightly", *arguments]
    done = subprocess.run(command, env=platform.client_environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nights_are_paused_until_they_are_switched_on(
    platform: MadeUp, deployments: dict[str, dict[str, Any]]
) -> None:
    """`make up` says so, and deploying again changes neither choice. Once on, runs at two UTC are planned."""
    nightly = deployments["nightly"]
    (schedule,) = nightly["schedules"]
    assert not schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 2 * * *", "UTC")
    paused = "The nightly schedule is paused; `finetune nightly on`"
    assert paused in platform.output
    assert _nightly(platform).startswith(paused)

    def deploy_again() -> tuple[bool, str]:
        again = platform.make("deploy")
        assert again.returncode == 0, again.stdout
        (kept,) = platform.api(f"/deployments/{nightly['id']}")["schedules"]
        return kept["active"], again.stdout

    active, said = deploy_again()
    assert not active
    assert paused in said
    assert _nightly(platform, "on").startswith("The nightly schedule is on; ")
    try:
        active, said = deploy_again()
        assert active
        assert "The nightly schedule is on" in said
        of_nightly = {"deployments": {"id": {"any_": [nightly["id"]]}}}
        runs = wait_for("a scheduled run", lambda: platform.api("/flow_runs/filter", of_nightly), 75)
        for run in runs:
            assert run["state"]["type"] == "SCHEDULED"
            start = _time(run["expected_start_time"])
            assert start.utcoffset().total_seconds() == 0
            assert (start.hour, start.minute) == (2, 0)
    finally:
        assert _nightly(platform, "off").startswith(paused)
    assert not deploy_again()[0]


@pytest.mark.parametrize(
    ("parameter", "complaint"), [("epochs=0", "epochs"), ("top_p=2", "top_p"), ("nonsense=1", "nonsense")]
)
def test_a_wrong_parameter_is_refused_at_once(platform: MadeUp, parameter: str, complaint: str) -> None:
    refused = platform.run(parameter)
    output, _ = refused.communicate(timeout=60)

    assert refused.returncode != 0
    assert complaint in output
    assert "UUID" not in output  # no flow run came into being


def test_two_runs_take_turns_and_leave_everything_behind(platform: MadeUp) -> None:
    """Both end Completed, one training after the other, each with its MLflow run and its registered version."""
    submitted = [platform.run(*FEW_STEPS, f"seed={seed}") for seed in (1, 2)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in submitted]
    finally:
        for process in submitted:
            process.kill()
    ids = []
    for process, output in zip(submitted, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        found = re.search(r"UUID: (\S+)", output)
        assert found
        ids.append(found[1])

    mlflow = client(platform.mlflow)
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
