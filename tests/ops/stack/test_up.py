"""``make up`` and ``make down`` with real servers, a real worker and real signals."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from made_up import ROOT, MadeUp, wait_for

from ops.machine.flock import hold_file
from ops.servers import Servers
from ops.stack.up import down
from ops.tracking.connection import client

pytestmark = pytest.mark.slow
FEW_STEPS = ("max_steps=4", "eval_freq=2", "sample_rows=1", "pass_rows=1", "max_new_tokens=4")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUp]:
    """Two GPUs by its settings, no password. The tests depend on their order; the last one ends it.

    The data root has the characters in its name that shells, URLs and supervisord treat specially, and the
    environment names a proxy that does not answer.
    """
    root = "a b%20c%s #d'e\"f$g;h,i&j"
    made = MadeUp(tmp_path_factory.mktemp("up"), root, FINETUNE_GPUS="2", HTTP_PROXY="http://127.0.0.1:9")
    try:
        made.load = os.getloadavg()[0]  # type: ignore[attr-defined]
        made.seconds = made.start()  # type: ignore[attr-defined]
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("pid", [-1, 0, 1, "1", None, [1], 1.5])
def test_a_damaged_lock_file_names_no_process(pid: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to -1 or 0 would end every process of the user. Signals are recorded here, not sent."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path))
    servers = Servers.load()
    servers.home.mkdir(parents=True)
    sent: list[object] = []
    monkeypatch.setattr("ops.stack.up.os.kill", lambda *signalled: sent.append(signalled))
    monkeypatch.setattr("ops.stack.up.STOP_SECONDS", 0.5)
    with hold_file(servers.home / "up.lock", wait=True) as lock:
        assert lock
        lock.write(json.dumps({"pid": pid}))
        lock.flush()
        assert down(servers) == 1
    assert sent == []


def test_it_is_ready_within_forty_seconds(up: MadeUp) -> None:
    seconds = up.seconds  # type: ignore[attr-defined]
    print(f"ready after {seconds:.1f} s")
    if seconds > 40 and up.load > 1:  # type: ignore[attr-defined]
        pytest.skip(f"{seconds:.0f} s, but other processes kept this machine busy")
    assert seconds <= 40


def test_it_prints_two_urls_and_what_to_do_next(up: MadeUp) -> None:
    assert f"Prefect  {up.prefect}\n" in up.output
    # The page of runs, which is there before the first run.
    assert f"MLflow   {up.mlflow}/#/experiments/1/runs?viewStateShareKey=finetune-scores&" in up.output
    assert f". {shlex.quote(f'{up.home}/client.env')}\n" in up.output
    assert "prefect deployment run finetune/tiny --watch\n" in up.output
    assert up.client_environment["PREFECT_API_URL"] == f"{up.prefect}/api"
    assert up.client_environment["MLFLOW_TRACKING_URI"] == up.mlflow


def test_everything_is_set_up(up: MadeUp) -> None:
    assert up.api("/work_pools/gpu")["concurrency_limit"] == 4
    assert up.api("/v2/concurrency_limits/tag:gpu")["limit"] == 2
    names = {deployment["name"] for deployment in up.api("/deployments/filter", {})}
    assert names == {d["name"] for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    (automation,) = up.api("/automations/filter", {})
    assert automation["enabled"]
    assert automation["trigger"]["posture"] == "Proactive"
    assert automation["trigger"]["within"] == 90
    assert automation["actions"][0]["state"] == "CRASHED"
    server = up.api("/admin/settings")["server"]
    assert server["concurrency"]["lease_storage"].endswith(".filesystem")
    assert server["tasks"]["tag_concurrency_slot_wait_seconds"] == 2
    assert not server["analytics_enabled"]
    assert not server["ui"]["show_promotional_content"]
    assert not server["ui"]["v2_enabled"]
    worker = Path(f"/proc/{up.one('prefect worker').pid}/environ").read_text().split("\0")
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30" in worker
    watcher = Path(f"/proc/{up.one('ops.recovery.watch').pid}/environ").read_text().split("\0")
    assert "FINETUNE_GPUS=2" in watcher


def test_only_this_machine_reaches_it(up: MadeUp) -> None:
    """All listening ports of its processes are bound to the loopback."""
    inodes = set()
    for process in up.processes():
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    bound = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # listening
                bound.append(fields[1].split(":")[0])
    assert len(bound) >= 2
    assert set(bound) == {"0100007F"}


def test_a_page_of_another_origin_may_not_use_prefect(up: MadeUp) -> None:
    """A browser lets a page use the API only if the server's answer allows the page's origin."""
    for origin, allowed in ((up.prefect, up.prefect), ("http://evil.example", None)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked = Request(f"{up.prefect}/api/flow_runs/filter", headers=headers, method="OPTIONS")
        try:
            with urlopen(asked, timeout=10) as answer:
                told = answer.headers.get("Access-Control-Allow-Origin")
        except HTTPError as refused:
            told = refused.headers.get("Access-Control-Allow-Origin")
        assert told == allowed


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:4200", "198.41.0.4"])
def test_a_foreign_host_is_refused(host: str, up: MadeUp) -> None:
    """Without a password too: a page whose name resolves to 127.0.0.1 (DNS rebinding) sends its own name."""
    for url in (f"{up.prefect}/api/health", f"{up.prefect}/", f"{up.mlflow}/api/2.0/mlflow/experiments/search"):
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(url, headers={"Host": host}), timeout=10)
        assert refused.value.code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_its_own_names_work(host: str, up: MadeUp) -> None:
    port = up.prefect.rpartition(":")[2]
    for path in ("/api/health", "/", "/ui-settings"):
        with urlopen(Request(up.prefect + path, headers={"Host": f"{host}:{port}"}), timeout=10) as answer:
            assert answer.status == 200


def test_prefect_s_pages_ask_the_server_that_sent_them(up: MadeUp) -> None:
    """By a path: on another machine an address of the loopback would mean that machine."""
    with urlopen(f"{up.prefect}/ui-settings", timeout=10) as answer:
        assert json.load(answer)["api_url"] == "/api"


def test_a_second_one_prints_the_addresses_of_the_first(up: MadeUp) -> None:
    before = up.processes()
    second = up.make("up")
    assert second.returncode == 0, second.stdout
    assert "running already" in second.stdout
    assert up.prefect in second.stdout
    assert up.mlflow in second.stdout
    assert up.processes() == before


def test_a_run_completes_and_both_sides_have_it(up: MadeUp) -> None:
    output, _ = up.run(*FEW_STEPS).communicate(timeout=150)
    run = up.flow_run(output)
    assert up.api(f"/flow_runs/{run}")["state"]["type"] == "COMPLETED", output[-3000:]
    mlflow = client(up.mlflow)
    (found,) = mlflow.search_runs(
        [mlflow.get_experiment_by_name("finetune").experiment_id], f"tags.`prefect.flow_run_id` = '{run}'"
    )
    assert found.info.status == "FINISHED"
    # In the data root, although its name has characters that URLs encode.
    artifacts = up.home / "artifacts" / found.info.experiment_id / found.info.run_id / "artifacts"
    assert (artifacts / "config.json").is_file()
    base = up.home.parent.parent
    assert {path.name for path in base.iterdir() if path.is_dir()} == {"elsewhere", up.home.parent.name}
    computing = found.data.metrics["wall_seconds/train"] + found.data.metrics["wall_seconds/evaluate"]
    facts = up.api(f"/flow_runs/{run}")
    submitted, started, ended = (
        datetime.fromisoformat(facts[moment]) for moment in ("expected_start_time", "start_time", "end_time")
    )
    around = (ended - started).total_seconds() - computing
    print(
        f"started {(started - submitted).total_seconds():.1f} s after it was submitted; "
        f"{computing:.1f} s of training and evaluation, {around:.1f} s around them"
    )


def test_idle_it_needs_less_than_a_gigabyte_and_a_half(up: MadeUp) -> None:
    """After a run has ended."""
    memory = up.memory()
    print("\n".join(f"{megabytes:6.0f} MB  {process}" for process, megabytes in memory.items()))
    assert len(memory) >= 6
    assert sum(memory.values()) <= 1536


@pytest.mark.parametrize("server", ["host_check", "mlflow"])
def test_a_killed_server_is_started_again(server: str, up: MadeUp) -> None:
    """The worker survives it."""
    worker = up.one("prefect worker").pid
    killed = up.one(server).pid
    os.kill(killed, signal.SIGKILL)
    url = f"{up.prefect}/api/health" if server == "host_check" else f"{up.mlflow}/health"
    wait_for("another process", lambda: up.processes(server) and up.one(server).pid != killed, 30)
    # MLflow's server has a listening child process, which would keep the port.
    orphans = [process for process in up.processes("uvicorn") if process.parent != up.one("mlflow").pid]
    wait_for("the end of orphans", lambda: set(orphans).isdisjoint(up.processes()), 30)
    wait_for(server, lambda: urlopen(url, timeout=5).status == 200, 60)
    assert up.one("prefect worker").pid == worker
    output, _ = up.run(*FEW_STEPS).communicate(timeout=150)
    assert up.api(f"/flow_runs/{up.flow_run(output)}")["state"]["type"] == "COMPLETED", output[-3000:]


def test_a_killed_worker_is_started_again(up: MadeUp) -> None:
    killed = up.one("prefect worker").pid
    os.kill(killed, signal.SIGKILL)
    wait_for("a worker", lambda: [p for p in up.processes("prefect worker") if p.pid != killed], 30)


def _train(up: MadeUp) -> str:
    """Start a run that will not end by itself, and wait until it trains. Returns its id."""
    output, _ = up.run("epochs=500", watch=False).communicate(timeout=60)
    run = up.flow_run(output)
    running = {"flow_runs": {"id": {"any_": [run]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    wait_for(
        "a training",
        lambda: [task for task in up.api("/task_runs/filter", running) if task["name"].startswith("train-")],
        180,
    )
    return run


def _state(up: MadeUp, run: str) -> str:
    """The run's state in Prefect's database, read after its server has ended."""
    with sqlite3.connect(up.home / "prefect" / "prefect.db") as connection:
        (state,) = connection.execute("select state_type from flow_run where id = ?", (run,)).fetchone()
    return str(state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_a_training_too(number: signal.Signals, up: MadeUp) -> None:
    """The training's run is Crashed in Prefect: the servers end after the flow run has reported its state.

    The signal goes to the whole process group, and make passes SIGTERM on: the two that arrive count as one.
    """
    if not up.processes():
        up.start()
    run = _train(up)
    assert any(process.flow_run == run for process in up.processes())

    status = up.interrupt(number)

    assert up.processes() == []
    assert status in (0, -number)  # make exits with 0 or by the signal
    assert "everything has ended" in up.output
    for port in (up.prefect, up.mlflow):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port.rpartition(":")[2])), timeout=1)
    assert _state(up, run) == "CRASHED"


def test_processes_left_by_a_crash_are_ended_by_up_and_down(up: MadeUp) -> None:
    """After kill -9 of supervisord and of `make up` itself, with fewer GPUs than before."""
    up.environment["FINETUNE_GPUS"] = "1"
    up.stop()  # what an earlier test has left, where this one runs alone
    up.start()
    assert up.api("/work_pools/gpu")["concurrency_limit"] == 3
    assert up.api("/v2/concurrency_limits/tag:gpu")["limit"] == 1
    assert len(up.api("/automations/filter", {})) == 1
    run = _train(up)
    supervisor = up.one("supervisord")
    before = {process.pid for process in up.processes()}
    assert up.process
    for pid in (supervisor.pid, supervisor.parent):
        os.kill(pid, signal.SIGKILL)
    up.process.wait(timeout=20)
    wait_for("its end", lambda: not up.processes("supervisord"), 10)
    training = {process.pid for process in up.processes() if process.flow_run == run}
    strays = {process.pid for process in up.processes()} - training
    assert len(strays) >= 4
    assert strays < before
    assert training

    up.start()
    for pid in strays:
        assert f"pid {pid} (" in up.output
    assert strays.isdisjoint(process.pid for process in up.processes())

    # The training goes on, and reports to Prefect's new server.
    assert "left alone, a flow run" in up.output
    assert training <= {process.pid for process in up.processes()}
    assert up.api(f"/flow_runs/{run}")["state"]["type"] == "RUNNING"

    ended = up.make("down")
    assert ended.returncode == 0, ended.stdout
    assert "ending make up (pid" in ended.stdout
    assert up.process.wait(timeout=10) is not None
    assert up.processes() == []
    assert _state(up, run) == "CRASHED"
    assert "nothing to end" in up.make("down").stdout


def test_make_up_alone_killed_ends_the_rest(up: MadeUp) -> None:
    """The same holds for an interrupt before it is ready."""
    up.begin()
    wait_for("supervisord", lambda: up.processes("supervisord"), 20)
    wait_for("both servers", lambda: up.processes("host_check") and up.processes("mlflow"), 20)
    os.kill(up.one("supervisord").parent, signal.SIGKILL)
    wait_for("the end of all", lambda: not up.processes(), 60)

    up.begin()
    wait_for("both servers", lambda: up.processes("host_check") and up.processes("mlflow"), 20)
    up.interrupt()
    assert "everything has ended" in up.output
    assert up.processes() == []


def test_supervisord_alone_killed_ends_the_rest(up: MadeUp) -> None:
    up.stop()  # what an earlier test has left, where this one runs alone
    up.start()
    os.kill(up.one("supervisord").pid, signal.SIGKILL)
    assert up.process
    assert up.process.wait(timeout=60) != 0
    assert "supervisord ended (status " in up.output
    assert up.processes() == []


@pytest.mark.parametrize(
    ("variable", "address", "complaint"),
    [
        # A socket: `make up` leaves it to the driver to look whether a database answers there.
        (
            "PREFECT_SERVER_DATABASE_CONNECTION_URL",
            "postgresql+asyncpg://u:s3cret@/x?host=/nowhere&port=9",
            "Prefect's server",
        ),
        ("MLFLOW_BACKEND_STORE_URI", "mysql+none://u:s3cret@127.0.0.1:9/x", "MLflow's server"),
    ],
)
def test_a_server_that_ends_when_it_starts(tmp_path: Path, variable: str, address: str, complaint: str) -> None:
    """It is not waited for until the limit of 120 s; the message has the last error of its log."""
    made = MadeUp(tmp_path, **{variable: address})
    try:
        made.begin()
        assert made.process
        assert made.process.wait(110) != 0
        said = rf"^{complaint} ends when it starts \(\S*Error.*\): see "
        assert re.search(said, made.output, re.MULTILINE), made.output
        assert "s3cret" not in made.output
    finally:
        made.stop()


def test_a_data_root_that_no_address_can_hold(tmp_path: Path) -> None:
    """SQLAlchemy takes what stands behind a question mark for options: the database would lie elsewhere."""
    made = MadeUp(tmp_path, "what?")
    made.begin()
    assert made.process
    assert made.process.wait(30) != 0
    assert "has a character that the address of a database cannot hold" in made.output
    assert not (tmp_path / "what?").exists()
