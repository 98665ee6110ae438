"""The commands of ``finetune``."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from flows import invoke
from flows.__main__ import main
from flows.arguments import Request
from flows.command_line import MODULES, app
from flows.commands import read_parameters
from flows.job import all_parameters
from flows.trials import SweepJob
from ops.text import as_setting

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {name for name in app if not name.startswith("-")}


def _help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The help of a command as one line, without its frames."""
    assert main([*words, "--help"]) == 0
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_help_has_every_parameter(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With default and meaning, as they are declared, and the value that the usual deployment has instead."""
    monkeypatch.setenv("COLUMNS", "400")
    text = _help(capsys, command)
    parameters = all_parameters(SweepJob) if command == "sweep" else all_parameters()
    assert len(parameters) > 40
    usual = read_parameters("sweep-tiny" if command == "sweep" else "tiny")
    assert len(usual) > 5
    for each in parameters:
        default = "null" if each.default is None else str(each.default)
        if each.name in usual and usual[each.name] != each.default:  # what is used where no deployment is named
            default += f"; deployment {'sweep-' if command == 'sweep' else ''}tiny: {as_setting(usual[each.name])}"
        assert f"--{each.name.replace('_', '-')} " in text
        assert f"{' '.join(each.meaning.split())} [default: {default}]" in text
    for group in ("Model and data set", "Training", "Evaluation", "Hardware", "What trains"):
        assert f" {group} " in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """And docs/commands.md has all of them."""
    text = _help(capsys)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert {"run", "sweep", "up", "down", "deploy", "worker", "watch", *MODULES} == COMMANDS
    for name in COMMANDS:
        assert f" {name} " in text
        assert f"`finetune {name}" in page
    for option in ("--config", "--dry-run", "--verbose", "--debug"):
        assert f"`{option}" in page
    assert set(re.findall(r"`finetune ([a-z]+)", page)) <= COMMANDS


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of the package which is installed."""
    assert main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"{project['name']} {project['version']}\n"


def test_modules_have_a_main() -> None:
    """Which takes arguments and returns an exit status."""
    for module, _ in MODULES.values():
        assert callable(import_module(module).main)


def test_the_entry_point_and_the_makefile() -> None:
    """The command is installed, and make calls commands that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["finetune"].partition(":")
    assert callable(getattr(import_module(module), function))
    called = re.findall(r"\$\(FINETUNE\) ([a-z]+)", (ROOT / "Makefile").read_text())
    assert COMMANDS - {"sweep", "nightly"} == set(called)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The flow runs that were asked for; none is started."""
    asked: list[Request] = []
    monkeypatch.setattr(invoke, "invoke", lambda request, verbose: asked.append(request) or 0)
    return asked


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["run", "--epochs", "2"], "epochs", 2),
        (["run", "--epochs=2"], "epochs", 2),
        (["run", "--learning_rate", "1e-4"], "learning_rate", "1e-4"),
        (["run", "--subset-start", "-1"], "subset_start", -1),
        (["run", "--promote"], "promote", True),
        (["run", "--no-promote"], "promote", False),
        (["run", "--promote", "true"], "promote", True),
        (["run", "--freeze_layers", "False", "tiny"], "freeze_layers", False),
        (["epochs=2"], "epochs", 2),
        (["tiny", "epochs=2"], "epochs", 2),
        (["sweep", "tiny", "--grid", "{epochs: [1, 2]}"], "grid", {"epochs": [1, 2]}),
    ],
)
def test_ways_to_give_a_parameter(words: list[str], name: str, value: object, requests: list[Request]) -> None:
    """As an option, as name=value, and without the word run."""
    assert main(words) == 0
    assert requests[0].parameters[name] == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "there is no command rnu: did you mean run?"),
        (["qqq"], "there is no command qqq: `finetune --help` lists them"),
        (["run", "--epoch", "1"], "there is no option --epoch: did you mean --epochs?"),
        (["run", "--epochs"], "--epochs"),
        (["run", "-x"], "there is no option -x: `finetune run --help` lists them"),
        (["learning_rate=0.1", "-x"], "there is no option -x: `finetune run --help` lists them"),
        (["--quiet=1"], "there is no option --quiet: `finetune --help` lists them"),
        (["up", "--secured"], "there is no option --secured: did you mean --secure?"),
    ],
)
def test_a_wrong_command_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence; exit status 2."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "null"])
def test_a_wrong_number_of_gpus(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sentence of this project's own, without pydantic's preface."""
    assert main(["run", f"gpus={value}"]) == 2
    assert capsys.readouterr().err == "gpus: a number of GPUs, at least 1, or all is needed\n"


@pytest.mark.parametrize("command", ["worker", "watch"])
def test_a_worker_needs_servers(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no password in their address, which Prefect would log."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert main([command]) == 2
    assert "PREFECT_API_URL and MLFLOW_TRACKING_URI must name the servers" in capsys.readouterr().err
    monkeypatch.setenv("PREFECT_API_URL", "http://a:b@127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([command]) == 2
    assert "PREFECT_API_URL must not contain a password" in capsys.readouterr().err
