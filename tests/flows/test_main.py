"""``make run`` as its users know it: no server, no account, and what it prints at the end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from flows.__main__ import command, main
from flows.arguments import complaint, parse
from flows.local import RUN
from ops.machine.process import end_processes, identify_process, tagged

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = [sys.executable, "-m", "flows", "run", "max_steps=1", "sample_rows=0", "pass_rows=0", "eval_rows=20"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a run with a fresh data root, the test's folder."""
    return {**os.environ, "FINETUNE_DATA_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_run_without_servers(tmp_path: Path, environment: dict[str, str]) -> None:
    """Whatever servers the environment names are left alone; the times add up, and scripts find the run."""
    dead = "http://127.0.0.1:9"
    environment |= {"PREFECT_API_URL": f"{dead}/api", "MLFLOW_TRACKING_URI": dead, "HTTP_PROXY": dead}
    small = ["max_steps=2", "sample_rows=1", "pass_rows=0", "eval_rows=20"]
    command = [sys.executable, "-m", "flows", "run", "tiny", *small]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-2] == f"tracking: sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert re.fullmatch(r"run: [0-9a-f]{32}", lines[-1])
    table = dict(re.findall(r"^(\w+) +(\d+\.\d\d) +\d+\.\d%$", done.stdout, re.MULTILINE))
    total = float(table.pop("total"))
    assert sum(map(float, table.values())) == pytest.approx(total, abs=0.1)
    assert {"start", "prefect", "mlflow", "prepare", "train", "evaluate", "publish"} <= table.keys()
    # The server has no pages to link to, and would never free the lease of a task that died.
    links = rows(tmp_path / "mlflow" / "mlflow.db", "select value from tags where key = 'prefect.flow_run_url'")
    limits = rows(tmp_path / "prefect" / "prefect.db", "select name from concurrency_limit_v2")
    assert (links, limits) == ([], [])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(environment: dict[str, str], closed: str) -> None:
    """Python has None for a closed stream: every command finds a stream there, and nothing else at its number."""
    asks = (
        "import os, sys; import flows.__main__ as m; m.open_streams(); "
        "sys.exit(any(s is None or s.isatty() or s.fileno() != n"
        " for n, s in enumerate((sys.stdin, sys.stdout, sys.stderr))))"
    )
    command = f"{shlex.join([sys.executable, '-c', asks])} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    chat = f"{shlex.join([sys.executable, '-m', 'flows', 'sample'])} {closed}"
    done = subprocess.run(
        chat,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


@pytest.mark.parametrize(
    ("words", "where", "told"),
    [
        (["run"], "flows.invoke._invoke", "interrupted: the same command goes on from what is done\n"),
        (["run", "--dry-run"], "flows.dry_run.show_estimate", "interrupted\n"),
        (["nightly"], "ops.stack.nightly.main", "interrupted\n"),
    ],
)
def test_ctrl_c_is_one_line(
    words: list[str], where: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever command it ends, with status 130."""

    def interrupt(*given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr(sys, "argv", ["finetune", *words])
    for name in ("flows.__main__.open_streams", "flows.__main__.end_in_order", "ops.text.escape_output"):
        monkeypatch.setattr(name, lambda: None)
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 130
    assert capsys.readouterr().err == told


def test_ctrl_c_is_one_line_while_a_command_is_imported(tmp_path: Path) -> None:
    """Its modules take a third of a second, and more on a slow machine."""
    package = tmp_path / "cyclopts"  # in place of the library, so that the moment is certain
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "flows", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    # By the signal itself, so that a shell's script or make ends too.
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")


@pytest.mark.slow
def test_what_a_killed_run_left_is_ended(environment: dict[str, str]) -> None:
    """Its server, perhaps at work on the databases; the server of a run that lives stays."""
    killed = subprocess.Popen(SHORTEST, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    mark = identify_process(killed.pid).to_json()
    while not (servers := [process for process in tagged(RUN, mark) if "uvicorn" in process.command]):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    living = subprocess.Popen(["sleep", "600"], env={**os.environ, RUN: identify_process().to_json()})
    try:
        done = subprocess.run(SHORTEST, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"ended what a killed run had left: {servers[0]}" in done.stdout
        assert tagged(RUN, mark) == []
        assert living.poll() is None
    finally:
        living.kill()
        living.wait()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_ends_at_once_and_leaves_nothing(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, moment: str
) -> None:
    """As from a terminal, to the whole group: its server hears how the run ended, and ends too."""
    run = subprocess.Popen(
        [*SHORTEST[:4], *SHORTEST[5:]], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    mark = identify_process(run.pid).to_json()
    lines: list[str] = []
    assert run.stdout is not None
    try:
        if moment == "training":
            while "step 1" not in (line := run.stdout.readline()):
                assert line, "".join(lines)
                lines.append(line)
        else:
            while not tagged(RUN, mark):
                assert run.poll() is None
                time.sleep(0.1)
            time.sleep(1)
        os.killpg(run.pid, number)
        output, _ = run.communicate(timeout=30)
        expected = -signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM
        assert run.returncode == expected, output[-3000:]
        assert "Traceback" not in output, output[-3000:]
        assert "Execution was aborted" not in output, "Prefect's log has it"
        assert tagged(RUN, mark) == []
        told = output.splitlines()[-1]
    finally:
        end_processes(lambda: tagged(RUN, mark), 0)
    if moment == "training":
        [(state,)] = rows(tmp_path / "prefect" / "prefect.db", "select state_type from flow_run")
        [(status,)] = rows(tmp_path / "mlflow" / "mlflow.db", "select status from runs")
        assert (state, status) == ("CRASHED", "KILLED")
        newest = max(path.name for path in tmp_path.glob("trainings/*/step-*"))
        assert newest > "step-00000000"  # of the step at which it was asked to stop
        step = int(newest.removeprefix("step-"))
        kept = f"a checkpoint of step {step} is kept, and a run with the same parameters goes on from there"
        assert told == f"stopped: {kept}"
        crashes = "select message from flow_run_state where type = 'CRASHED'"
        assert "Execution was aborted" in rows(tmp_path / "prefect" / "prefect.db", crashes)[0][0]
    else:
        assert told == "interrupted: the same command goes on from what is done"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["sample", "--help"], ["run", "--dry-run"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone(words: list[str], buffered: bool, environment: dict[str, str]) -> None:
    """As of `finetune --help | head -1`: no word, and the exit status of a process that SIGPIPE ended."""
    environment |= {"PYTHONUNBUFFERED": "" if buffered else "1"}
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "flows", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    assert done.stderr == b""
    # argparse passes over the error if it writes at once.
    assert done.returncode == (0 if words[0] == "sample" and not buffered else 128 + signal.SIGPIPE)


def test_an_output_that_is_full(environment: dict[str, str]) -> None:
    """One sentence, in place of Python's when it ends."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "flows", "sample", "--help"],
            cwd=ROOT, env=environment | {"PYTHONUNBUFFERED": ""}, stdout=full, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"No space left on device\n")


def rows(database: Path, query: str) -> list[tuple[str, ...]]:
    """What sqlite answers."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.slow
def test_two_first_runs_at_once(environment: dict[str, str]) -> None:
    """One makes the databases, and the other waits for it."""
    runs = [
        subprocess.Popen(
            SHORTEST, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=400)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert sum("waiting for databases, held by make run" in output for output in outputs) == 1


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"epoch": 1}, "no parameter is called epoch"),
        ({"epochs": 0}, "epochs"),
        ({"model_size": 125}, "model_size"),
        ({"device": "tpu"}, "device"),
        ({"dataset": ""}, "dataset"),  # not the working directory
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, object], named: str) -> None:
    """In one message, not in a traceback; a deployment's own parameters are all right."""
    assert named in (complaint(parameters) or "")
    assert complaint({"model_size": "355m", "epochs": 1}) is None


def _imported(code: str) -> set[str]:
    """The top-level modules that a new interpreter has imported after this code, but for the standard library's."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words",
    [
        ["run", "epoch=1"],
        ["run", "epochs=0"],
        ["run", "nosuch"],
        ["run", "--epoch", "1"],
        ["run", "dataset=/nowhere"],
        ["run", "--help"],
        ["sweep", "--help"],
        ["--help"],
        ["rnu"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_without_slow_imports(words: list[str]) -> None:
    """Their imports take seconds."""
    imported = _imported(f"from flows.__main__ import main; main({words!r})")
    assert "pydantic" in imported, "the parameters were looked at"
    assert imported & {"torch", "prefect", "mlflow", "numpy", "pandas", "transformers", "datasets"} == set()


def test_what_only_later_steps_need_is_imported_later() -> None:
    """Before the first step of a training; MLflow is imported when its database is opened."""
    imported = _imported("from flows.local import _import_flow; _import_flow()")
    assert {"torch", "prefect"} <= imported
    assert imported & {"transformers", "datasets", "tokenizers", "pyarrow", "matplotlib", "huggingface_hub"} == set()


def test_a_parameter_that_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither is taken."""
    assert main(["run", "epochs=1", "epochs=2"]) == 2
    assert capsys.readouterr().err == "epochs is given twice\n"
    for words in (["a\nb=1", "a\nb=1"], ["a\nb", "c"], ["a\nb=["], ["\n" + "x" * 5000 + "=["]):
        assert main(["run", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 200


@pytest.mark.parametrize(
    "argument",
    [
        "dataset=[x",
        "learning_rate={",
        "dataset=2026-13-45",
        "epochs=!!bool x",
        "seed=!!timestamp x",
        "dataset={a: 1, a: 2}",
    ],
)
def test_a_value_that_cannot_be_read(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started."""
    assert main(["run", argument]) == 2
    assert capsys.readouterr().err.startswith(f"{argument}: ")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("run_name=a\nb", "run_name: printable characters on one line are allowed, not '\\n'"),
        ("dataset='a\nb'", "dataset: printable characters on one line are allowed, not '\\n'"),
        ("run_name=a\x01b", "run_name: printable characters on one line are allowed, not '\\x01'"),
        ("dataset=\x1b[2J", "dataset: printable characters on one line are allowed, not '\\x1b'"),
        ('run_name="a\\tb"', "run_name: printable characters on one line are allowed, not '\\t'"),
        ('run_name="a\\u2028b"', "run_name: printable characters on one line are allowed, not '\\u2028'"),
        ('dataset="a\\eb"', "dataset: printable characters on one line are allowed, not '\\x1b'"),
    ],
)
def test_control_characters(
    argument: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameter, character and what is allowed are named; YAML would make a space of a line break."""
    monkeypatch.setattr("flows.invoke._invoke", lambda *given: 0)  # where it is not refused, nothing is trained
    assert main(["run", argument]) == 2
    error = capsys.readouterr().err
    assert error == f"{said}\n"


def test_a_list_may_have_several_lines() -> None:
    """As a grid that a shell script writes."""
    assert parse(["sweep-tiny", "grid={epochs: [1,\n 2]}"]).parameters["grid"] == {"epochs": [1, 2]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"deployments: 3",
        b"deployments: [1]",
        b"{",
        b"\xff",
        b"deployments: [{name: x}]",
        b"deployments: [{name: tiny, parameters: ''}]",
        b"deployments: [{name: tiny, parameters: {1: 2}}]",
        b"deployments: [{name: tiny, parameters: {}}, {name: tiny, parameters: {epochs: 1}}]",
        b"deployments: [{name: tiny, parameters: {epochs: 1, epochs: 2}}]",
        b"a: !!bool x",
        b"[" * 5000,
    ],
    ids=lambda content: content[:70].decode(errors="replace"),
)
def test_a_damaged_list_of_deployments(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence that names the file."""
    path = tmp_path / "prefect.yaml"
    path.write_bytes(content)
    monkeypatch.setattr("flows.commands.DEPLOYMENTS", path)
    assert main(["run"]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged, restore it: " in error
    assert error.count("\n") == 1


def test_a_value_that_contains_itself_many_times(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefect's check of it would never end; the message has one line."""
    lines = ["[&a0 [x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    assert main(["run", "dataset=" + ",\n".join(lines) + "]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dataset=[&a0 [x]")
    assert error.endswith("the value is not YAML; quote it\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", [f"epochs=1{'0' * 5000}", f"dataset={'[' * 5000}"], ids=["digits", "brackets"])
def test_a_value_that_is_too_long_to_be_read(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The beginning of it is shown."""
    assert main(["run", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(argument[:50])
    assert len(error) < 200


def test_a_data_root_that_no_database_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence; nothing is made, there or elsewhere."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "what?"))
    assert main(["run"]) == 2
    assert "what?' has a character that" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_data_root_with_special_characters(tmp_path: Path, environment: dict[str, str]) -> None:
    """Both databases lie in it."""
    root = tmp_path / "a b#c%20d&e=f;g$HOME~'ü+"
    environment |= {"FINETUNE_DATA_ROOT": str(root)}
    done = subprocess.run(SHORTEST, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == [root]
    assert {path.name for path in root.rglob("*.db")} == {"mlflow.db", "prefect.db"}
