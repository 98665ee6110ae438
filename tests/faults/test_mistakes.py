"""Twelve mistakes of users and machines: each is one sentence, on the terminal and in Prefect, and no traceback."""

from __future__ import annotations

import re
import resource
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from faulty import Run
from made_up import wait_for
from mistakes import MISTAKES, SHORT, environment_of, run_command

# Exit status, and what the sentence has.
EXPECTED = {
    "wrong path": (2, r"rows\.jsonl does not exist: give a file or folder"),
    "folder without rows": (2, r"dataset folder \S+/data holds no file of \.jsonl"),
    "no network": (1, r"Could not fetch the model .*; a local copy can be given as weights_dir"),
    "wrong weights": (2, r"model\.safetensors is not a whole safetensors file: .*: copy or download it again"),
    "too many layers": (2, r"num_unfrozen_layers 7 is not between 0 and 6, the blocks of tiny"),
    "no GPU": (2, r"device 'cuda' is not available, torch sees no GPU: use device=cpu or auto"),
    "full disk": (1, r"has \S+ GB free, the run may need \S+ GB: free some"),
    "read-only data root": (
        1,
        r"nothing can be written in the data root \S+/root \(.*only file system\): set FINETUNE_D",
    ),
    "port taken": (1, r"cannot listen on 127\.0\.0\.1:\d+ \(Address already in use\): set FINETUNE_PREFECT_PORT"),
    "older database": (1, r"was made by an older MLflow: copy the file, then run `mlflow db upgrade"),
    "damaged database": (1, r"Prefect's database \S+ is damaged .*: restore a copy of it"),
    "unknown parameter": (2, r"no parameter is called epoch: did you mean epochs\?"),
}
IN_PREFECT = {"no network", "wrong weights", "no GPU", "full disk"}  # the others end before a flow run begins
AT_ONCE = {"wrong path", "folder without rows", "too many layers", "unknown parameter"}
_PROGRESS = re.compile(r"\d\d:\d\d:\d\d (?!error|warning)|  (model|rows|tokens|steps|device|disk) ")


_LONG = ("no network", "wrong weights", "full disk")  # they start a flow run each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _LONG else []) for name in MISTAKES]
)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path) -> None:
    """With its exit status; nothing but lines of progress stands before it, and MLflow has no run of it."""
    status, pattern = EXPECTED[name]
    with MISTAKES[name](tmp_path) as case:
        environment = environment_of(tmp_path, case)
        words = [*case.command, *(SHORT if case.command == ("run",) else ()), *case.parameters]
        found = run_command([sys.executable, "-m", "flows", *words], environment)
        lines = found.output.splitlines()
        assert found.status == status, found.output
        assert re.search(pattern, lines[-1]), found.output
        assert [line for line in lines[:-1] if not _PROGRESS.match(line)] == []
        if name in AT_ONCE:
            assert len(lines) == 1
            print(f"{name}: {found.seconds:.2f} s")
        root = Path(environment["FINETUNE_DATA_ROOT"])
        if name in IN_PREFECT:
            _check_prefect(root / "prefect" / "prefect.db", lines[-1])
            assert _rows(root / "mlflow" / "mlflow.db", "select * from runs where lifecycle_stage = 'active'") == []


def _check_prefect(database: Path, sentence: str) -> None:
    """The flow run's state has the sentence and nothing else, and so has one line of its log."""
    states = _rows(database, "select type, message from flow_run_state order by timestamp desc limit 1")
    assert states == [("FAILED", sentence)]
    log = [message for (message,) in _rows(database, "select message from log")]
    assert [message for message in log if sentence in message] == [sentence]
    assert not any("Traceback" in message for message in log)


def _rows(database: Path, query: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def test_a_typo_is_answered_within_a_second(tmp_path: Path) -> None:
    """Of processor time, which is what it takes on a machine without other work: nothing is waited for."""
    with MISTAKES["unknown parameter"](tmp_path) as case:
        words = [sys.executable, "-m", "flows", "run", *case.parameters]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = run_command(words, environment_of(tmp_path, case))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{used:.2f} s of processor time, {found.seconds:.2f} s in all")
    assert 0 < used <= 1


@pytest.mark.slow
def test_debug_brings_the_traceback(tmp_path: Path) -> None:
    """On request, on the terminal and in Prefect's log."""
    with MISTAKES["no GPU"](tmp_path) as case:
        words = [sys.executable, "-m", "flows", "run", "--debug", *case.parameters]
        found = run_command(words, environment_of(tmp_path, case))
    assert "Traceback (most recent call last)" in found.output
    assert "in resolve_device" in found.output
    log = _rows(tmp_path / "root" / "prefect" / "prefect.db", "select message from log")
    assert any("Traceback" in message for (message,) in log)


BUG = """
import tasks.download
tasks.download._dataset = lambda settings, config: int("x")
import sys
from flows.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    """An error that this project did not raise; the MLflow run stays, as FAILED."""
    with MISTAKES["unknown parameter"](tmp_path) as case:
        environment = environment_of(tmp_path, case)
    found = run_command([sys.executable, "-c", BUG, "run", *SHORT], environment)
    assert found.status == 1
    assert "Traceback (most recent call last)" in found.output
    assert "invalid literal for int()" in found.output
    runs = _rows(tmp_path / "root" / "mlflow" / "mlflow.db", "select status, lifecycle_stage from runs")
    assert runs == [("FAILED", "active")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wrong path", "folder without rows", "wrong weights", "too many layers", "no GPU", "unknown parameter"]
)
def test_a_deployment_says_the_same(name: str, tmp_path: Path, submit: Callable[..., Run]) -> None:
    """A worker's run: its state and its log have the sentence, and no traceback."""
    with MISTAKES[name](tmp_path) as case:
        run = submit({key: _value(text) for key, _, text in (word.partition("=") for word in case.parameters)})
        wait_for("the end", lambda: run.state["type"] == "FAILED", 120)
        message = run.state["message"]
        assert re.fullmatch(rf"[^\n]*{EXPECTED[name][1]}[^\n]*", message), message
        wait_for("the log line", lambda: message in run.logs, 30)
        wait_for("the end of the log", lambda: "Finished in state" in run.logs or "not fit the flow" in run.logs, 30)
        time.sleep(2)  # the process of the flow run logs its error again, if anything
        assert run.logs.count(message) == 1
        assert "Traceback" not in run.logs


def _value(text: str) -> str | int:
    return int(text) if text.isdecimal() else text
