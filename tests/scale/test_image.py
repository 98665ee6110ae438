"""The Dockerfile, built by buildah on Debian's python3 and run: a training in it, and its worker at work."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from images import Store, free_bytes, need_programs
from installation import installed
from made_up import free_ports, wait_for

pytestmark = pytest.mark.slow
IMAGE = "localhost/finetune"
NEEDED_BYTES = 10_000_000_000  # vfs copies each layer whole
FEW_STEPS = ("max_steps=3", "eval_freq=2", "eval_rows=40", "sample_rows=1", "pass_rows=2", "max_new_tokens=4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The image, built once. Takes about five minutes."""
    need_programs()
    store = Store(tmp_path_factory.mktemp("store"))
    if free_bytes(store.folder) < NEEDED_BYTES:
        pytest.skip(f"the image needs {NEEDED_BYTES:,} bytes of disk")
    store.make_base("localhost/base")
    store.build(IMAGE, BASE="localhost/base", COMMIT="0123abc", PACKAGES="bubblewrap")
    return store


@pytest.fixture(scope="module")
def container(store: Store) -> Iterator[list[str]]:
    """The beginning of a command line that runs the rest in a container, as the image says."""
    name = store.call("buildah", "from", IMAGE).split()[-1]
    yield [*store.command("buildah"), "run", "--isolation", "chroot", name, "--"]
    store.call("buildah", "rm", name)


def _output(command: list[str], *rest: str, timeout: float = 300) -> str:
    done = subprocess.run(
        [*command, *rest], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_it_holds_the_project_and_nothing_else(store: Store, container: list[str]) -> None:
    """No root, no tools of development, no data, no history, and nothing of the machine that built it."""
    config = store.configuration(IMAGE)
    assert config["User"] == "finetune"
    assert config["Cmd"][:3] == ["python", "-m", "ops.stack.worker"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert not any(name in text for text in config["Env"] for name in ("PIP_", "AWS_", "PASSWORD"))
    assert _output(container, "id", "-u").split() == ["1000"]
    assert set(_output(container, "ls", "-A", "/finetune").split()) == {
        "CHANGELOG.md", "LICENSE", "NOTICE", "README.md", "constraints.txt",
        "finetune_gpt2_code.egg-info", "flows", "mlflow", "model", "ops", "prefect.yaml", "pyproject.toml", "tasks",
    }  # fmt: skip
    installed_packages = _output(container, "/venv/bin/pip", "list").split()
    assert {"psycopg2-binary", "boto3"} <= set(installed_packages)
    assert not {"pytest", "ruff", "mypy", "hypothesis"} & set(installed_packages)
    for command in ("echo > /finetune/x", "echo > /venv/x", "cat /etc/pip.conf"):
        assert subprocess.run([*container, "sh", "-c", command], capture_output=True).returncode != 0, command
    assert _output(container, "find", "/finetune", "/venv", "-writable", "-not", "-type", "l") == ""


def test_a_training_in_it(container: list[str]) -> None:
    """``python -m flows``, as make run does; the commit is the one that the build was given."""
    said = _output(container, "python", "-m", "flows", *FEW_STEPS)
    assert "tracking: sqlite:////data/mlflow/mlflow.db" in said
    run = said.split()[-1]
    ask = "import sys, mlflow; print(mlflow.get_run(sys.argv[1]).data.tags['mlflow.source.git.commit'])"
    commit = _output(
        container, "env", "MLFLOW_TRACKING_URI=sqlite:////data/mlflow/mlflow.db", "python", "-c", ask, run
    )
    assert commit.split()[-1] == "0123abc"


def test_its_command_is_a_worker(store: Store, container: list[str], tmp_path: Path) -> None:
    """The command of the image takes a run of a deployment, and answers the health check."""
    command = store.configuration(IMAGE)["Cmd"]
    check = store.configuration(IMAGE)["Healthcheck"]["Test"]
    (port,) = free_ports(1)
    with installed(tmp_path, worker=False) as servers:
        names = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_WORKER_QUERY_SECONDS")
        settings = [f"{name}={servers.environment[name]}" for name in names]
        settings += [f"PREFECT_WORKER_WEBSERVER_PORT={port}", "FINETUNE_LOCKS=/tmp/locks", "OMP_NUM_THREADS=1"]
        with (tmp_path / "container.log").open("wb") as log:
            worker = subprocess.Popen([*container, "env", *settings, *command], stdout=log, stderr=log)
        try:
            said, _ = servers.run(*FEW_STEPS).communicate(timeout=300)
            assert "Completed" in said, said[-3000:] + (tmp_path / "container.log").read_text()[-3000:]
            health = f"http://127.0.0.1:{port}/health"
            assert wait_for("the health check", lambda: urlopen(health, timeout=5).status == 200, 30)
            _output(container, check[1], check[2], check[3].replace("8080", str(port)))
        finally:
            for pid in servers.descendants("PREFECT_API_URL"):
                if Path(f"/proc/{pid}/root").readlink() != Path("/"):
                    subprocess.run(["kill", str(pid)])
            assert worker.wait(timeout=60) == 0
