"""Settings, credentials and processes of ``make up``, without starting a server."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.machine.process import tagged
from ops.servers import TAG_VARIABLE, Servers, count_gpus, gpu_count
from ops.stack.up import main

NAMES = ("FINETUNE_HOST", "FINETUNE_SECURE", "FINETUNE_GPUS", "FINETUNE_PREFECT_PORT", "FINETUNE_MLFLOW_PORT")


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "root" / "server").mkdir(parents=True)


def test_by_default_only_this_machine_has_access_without_a_password() -> None:
    servers = Servers.load()
    assert (servers.host, servers.prefect_port, servers.mlflow_port) == ("127.0.0.1", 4200, 5000)
    assert not servers.secure
    assert servers.gpus == 1
    assert servers.client_environment() == {
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "FINETUNE_GPUS": "1",
    }
    assert not servers.password_file.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FINETUNE_GPUS", "0"),
        ("FINETUNE_GPUS", "two"),
        ("FINETUNE_PREFECT_PORT", "65536"),
        ("FINETUNE_MLFLOW_PORT", "-1"),
        ("FINETUNE_MLFLOW_PORT", "4200"),
        ("FINETUNE_SECURE", "maybe"),
    ],
)
def test_a_wrong_setting_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert value in said


def test_an_address_of_another_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message does not suggest another port, which would not help."""
    monkeypatch.setenv("FINETUNE_HOST", "192.0.2.1")
    assert main([]) == 1
    said = capsys.readouterr().out
    assert "192.0.2.1:4200" in said
    assert "set FINETUNE_HOST" in said
    assert "FINETUNE_PREFECT_PORT" not in said


@pytest.mark.parametrize("arguments", [[], ["down"]])
def test_a_data_root_that_is_a_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The setting is wrong for both: `down` would look for processes of another data root."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "file"))
    assert main(arguments) == 2
    said = f"the data root {tmp_path / 'file'} is a file: set FINETUNE_DATA_ROOT to a folder\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("host", "asked", "secure"),
    [
        ("127.0.0.1", "", False),
        ("localhost", "", False),
        ("127.0.0.1", "1", True),
        ("0.0.0.0", "", True),
        ("10.1.2.3", "", True),
        ("0.0.0.0", "0", False),
    ],
)
def test_servers_that_others_can_reach_require_a_password_unless_switched_off(
    host: str, asked: str, secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_HOST", host)
    monkeypatch.setenv("FINETUNE_SECURE", asked)
    servers = Servers.load()
    assert servers.secure is secure
    assert ("PREFECT_SERVER_API_AUTH_STRING" in servers.environment()) is secure
    assert ("basic-auth" in servers.environment()["FINETUNE_MLFLOW_OPTIONS"]) is secure


def test_shells_and_the_watcher_get_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through client.env and the environment: this machine has no GPU, all machines together have three."""
    monkeypatch.setenv("FINETUNE_GPUS", "3")
    servers = Servers.load()
    servers.write_client_file()
    assert "export FINETUNE_GPUS=3\n" in servers.client_file.read_text()
    assert servers.environment()["FINETUNE_GPUS"] == "3"


def test_the_password_is_made_once_and_for_its_owner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_SECURE", "1")
    servers = Servers.load()
    servers.client_file.write_text("readable by all")
    servers.client_file.chmod(0o644)
    password = servers.password()
    servers.write_client_file()

    assert len(password) >= 32
    assert Servers.load().password() == password
    for path in (servers.password_file, servers.client_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert password in path.read_text()
    servers.password_file.write_text("")
    with pytest.raises(ValueError, match="is empty: remove it"):
        servers.password()


def test_servers_and_credentials_of_the_users_shell_are_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "https://elsewhere/api")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_PROFILE", "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    environment = Servers.load().environment()
    assert environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert {"elsewhere", "secret"}.isdisjoint(environment.values())


def test_another_database_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Servers.load().environment()["MLFLOW_BACKEND_STORE_URI"].startswith("sqlite:///")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://db/mlflow")
    assert Servers.load().environment()["MLFLOW_BACKEND_STORE_URI"] == "postgresql://db/mlflow"


def test_a_database_that_mlflow_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow's server would log the address with its password."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "oracle://me:canary-pw@db/mlflow")
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "MLFLOW_BACKEND_STORE_URI=oracle://db/mlflow" in said
    assert "canary" not in said


def test_pages_ask_the_server_that_sent_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a browser on another machine; addresses that the user has set for a proxy are kept."""
    monkeypatch.setenv("FINETUNE_HOST", "0.0.0.0")
    environment = Servers.load().environment()
    assert environment["PREFECT_SERVER_UI_API_URL"] == "/api"
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200"
    monkeypatch.setenv("PREFECT_SERVER_UI_API_URL", "https://proxy.example/api")
    monkeypatch.setenv("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "https://proxy.example")
    environment = Servers.load().environment()
    assert environment["PREFECT_SERVER_UI_API_URL"] == "https://proxy.example/api"
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "https://proxy.example"


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("GPU-ab12, GPU-cd34", 2)]
)
def test_gpus_that_are_visible_count(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus() == 0
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    assert count_gpus() == 2
    assert Servers.load().gpus == 2


def test_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """FINETUNE_GPUS, else the GPUs of this machine, at least one; a wrong value is named."""
    monkeypatch.delenv("FINETUNE_GPUS", raising=False)
    monkeypatch.setattr("ops.servers.count_gpus", lambda: 0)
    assert gpu_count() == 1
    monkeypatch.setattr("ops.servers.count_gpus", lambda: 4)
    assert gpu_count() == 4
    monkeypatch.setenv("FINETUNE_GPUS", "2")
    assert gpu_count() == 2
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("FINETUNE_GPUS", wrong)
        with pytest.raises(ValueError, match="FINETUNE_GPUS"):
            gpu_count()


def test_a_long_path_has_a_socket_that_the_kernel_can_bind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / ("long" * 30)))
    path = Servers.load().socket
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    path.unlink()


def test_a_taken_port_is_named_and_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("FINETUNE_MLFLOW_PORT", str(other.getsockname()[1]))
        monkeypatch.setenv("FINETUNE_PREFECT_PORT", "4299")
        assert main([]) == 1
    said = capsys.readouterr().out
    assert "FINETUNE_MLFLOW_PORT" in said
    assert "FINETUNE_PREFECT_PORT" not in said
    assert tagged(TAG_VARIABLE, str(Servers.load().home)) == []


def test_the_configuration_is_one_that_supervisord_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program has its own log of limited size; blanks and % in a path are allowed."""
    from supervisor.options import ServerOptions

    monkeypatch.setenv("FINETUNE_DATA_ROOT", os.environ["FINETUNE_DATA_ROOT"] + "/a %s b")
    servers = Servers.load()
    servers.logs.mkdir(parents=True)
    for name, value in servers.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(servers.home)
    options = ServerOptions()
    options.realize(["-c", str(Path(__file__).resolve().parents[2] / "ops" / "stack" / "supervisord.conf")])
    programs = {group.name: group.process_configs[0] for group in options.process_group_configs}
    assert set(programs) == {"prefect", "mlflow", "worker", "watch"}
    assert max(programs.values(), key=lambda program: program.priority).name == "worker"  # ended first
    for program in programs.values():
        assert program.autorestart  # always, or unless it was asked to end
        assert program.stdout_logfile == f"log/{program.name}.log"  # in its working directory
        assert program.redirect_stderr
        assert 0 < program.stdout_logfile_maxbytes <= 10 * 2**20


def test_down_where_nothing_was_ever_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down"]) == 0
    assert "nothing to end" in capsys.readouterr().out
    (tmp_path / "root" / "server" / "up.lock").unlink()
    (tmp_path / "root" / "server").rmdir()
    assert main(["down"]) == 0
    assert not (tmp_path / "root" / "server").exists()


def test_down_ends_the_processes_that_were_left_and_prints_them(
    sleeper: Callable[..., subprocess.Popen[bytes]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of this data root: also a flow run that ignores SIGTERM, but no process of another data root."""
    monkeypatch.setattr("ops.stack.up.SAVE_SECONDS", 0.5)
    home = str(Servers.load().home)
    ours = sleeper(**{TAG_VARIABLE: home})
    run = sleeper(deaf=True, **{TAG_VARIABLE: home, "PREFECT__FLOW_RUN_ID": "1234"})
    other = sleeper(**{TAG_VARIABLE: home + "-of-another"})
    assert main(["down"]) == 0
    assert ours.wait(5) == -signal.SIGTERM
    assert run.wait(5) == -signal.SIGKILL
    assert other.poll() is None
    said = capsys.readouterr().out
    for process in (ours, run):
        assert f"pid {process.pid} (" in said
    assert f"pid {other.pid} (" not in said
