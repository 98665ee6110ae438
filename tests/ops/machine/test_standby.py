"""Processes that are started ahead of their work, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from made_up import ROOT, wait_for

from ops.machine.standby import Standby, dismiss, end
from ops.machine.stopping import ASKING

Begin = Callable[[str], Standby]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """begin(text): a process whose module has that text."""
    begun: list[Standby] = []

    def start(text: str) -> Standby:
        (tmp_path / "made_up_work.py").write_text(text)
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        begun.append(Standby("made_up_work", dict(os.environ) | {"PYTHONPATH": path}))
        return begun[-1]

    yield start
    dismiss([each for each in begun if each.process.returncode is None])


def written(path: Path) -> Callable[[], bool]:
    """Whether a file is there."""
    return path.exists


def test_it_works_in_the_environment_of_now(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in that in which it was started; and it ends in order although its stdin is still open."""
    monkeypatch.setenv("REMOVED", "before")
    process = begin(
        "import os\n"
        "names = ('REMOVED', 'ADDED')\n"
        "print('imported', *map(os.environ.get, names), flush=True)\n"
        "def work(text, closed): print(text, *map(os.environ.get, names), closed.is_set())\n"
    )
    lines = process.lines()
    assert next(lines) == "imported before None"
    monkeypatch.delenv("REMOVED")
    monkeypatch.setenv("ADDED", "später")
    process.give("the work")
    assert list(lines) == ["the work None später False"]
    assert process.process.wait(30) == 0
    assert end([process], 30) == {}


def test_it_works_until_it_is_asked_to_end(begin: Begin) -> None:
    """The event that it is given is set, and what it does then is done."""
    process = begin("def work(text, closed): print('works', flush=True); closed.wait(60); print(closed.is_set())")
    process.give("")
    lines = process.lines()
    assert next(lines) == "works"
    assert end([process], 30) == {}
    assert list(lines) == ["True"]


def test_one_that_does_not_end_is_killed(begin: Begin) -> None:
    """After the time that it is given, and its status says so."""
    process = begin("import time\ndef work(text, closed): print('works', flush=True); time.sleep(60)")
    process.give("")
    assert next(process.lines()) == "works"
    begun = time.monotonic()
    assert end([process], 1) == {process.pid: -signal.SIGKILL}
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("when", ["it imports", "it waits"])
def test_it_ends_at_once_without_work(begin: Begin, when: str) -> None:
    """Also in the middle of an import that takes long."""
    process = begin(f"import time\nprint('begins', flush=True)\ntime.sleep({60 if when == 'it imports' else 0})")
    assert next(process.lines()) == "begins"
    time.sleep(0 if when == "it imports" else 0.5)
    begun = time.monotonic()
    assert end([process], 30) == {}
    assert time.monotonic() - begun < 5


def test_one_that_is_stopped_is_dismissed(begin: Begin) -> None:
    """It cannot see that its stdin is closed."""
    process = begin("print('begins', flush=True)")
    assert next(process.lines()) == "begins"
    os.kill(process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    dismiss([process])
    assert time.monotonic() - begun < 5
    assert not psutil.pid_exists(process.pid)


@pytest.mark.parametrize("early", [True, False])
def test_signals_that_ask_a_flow_run_to_end_do_not_reach_it(begin: Begin, early: bool) -> None:
    """Neither before Python runs in it, nor while it waits."""
    process = begin("print('imported', flush=True)\ndef work(text, closed): print(text)")
    lines = process.lines()
    if not early:
        assert next(lines) == "imported"
    for number in ASKING:
        os.kill(process.pid, number)
    process.give("the work")
    assert list(lines) == (["imported"] if early else []) + ["the work"]
    assert process.process.wait(30) == 0


def test_one_whose_imports_fail_says_so(begin: Begin) -> None:
    """When its end is looked at, and not before: whoever gives it work goes on."""
    process = begin("import a_module_that_is_not_there")
    assert process.process.wait(30) == 1
    process.give("the work")
    assert list(process.lines())[-1] == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert end([process], 30) == {process.pid: 1}


@pytest.mark.parametrize("when", ["it imports", "it waits", "it works"])
def test_it_does_not_outlive_the_process_that_started_it(tmp_path: Path, when: str) -> None:
    """Which is killed and cannot say anything."""
    slow = "time.sleep(60)" if when == "it imports" else "pass"
    (tmp_path / "made_up_work.py").write_text(
        f"import pathlib, time\npathlib.Path('begins').touch()\n{slow}\n"
        "def work(text, closed): pathlib.Path('works').touch(); closed.wait(60)\n"
    )
    give = "process.give('')" if when == "it works" else "pass"
    script = (
        "import time; from ops.machine.standby import Standby; process = Standby('made_up_work'); "
        f"print(process.pid, flush=True); {give}; time.sleep(60)"
    )
    environment = dict(os.environ) | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    starter = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    helper = psutil.Process(int(starter.stdout.readline()))
    wait_for("it has come so far", written(tmp_path / ("works" if when == "it works" else "begins")), 30)
    time.sleep(0.5)
    assert helper.is_running()
    starter.kill()
    starter.wait()
    wait_for("it is gone", lambda: not helper.is_running(), 10)
