"""The commands of ``finetune``, and what each of them starts.

The parameters of ``run`` and ``sweep`` are made from those of the flows (flows/job.py). The other commands are
modules with options of their own. Nothing here imports torch, Prefect or MLflow: help and mistakes are answered at
once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter, UnknownOptionError, UnusedCliTokensError

from flows.arguments import DEFAULT_DEPLOYMENTS, parse
from flows.commands import read_deployments, read_parameters
from flows.job import GROUP_TITLES, all_parameters
from flows.trials import SweepJob, job_kind
from ops.mistakes import DEBUG_VARIABLE, UsageError
from ops.parsers import PARSERS
from ops.settings import Settings
from ops.text import as_setting, suggestion

_TRUTHS = ("true", "false")
_OPTIONS = Group("Options", sort_key=0)
# The commands that have their options in their own modules: module, help.
MODULES = {
    "sample": ("ops.tracking.sample", "Prompt a tuned model."),
    "compare": (
        "ops.tracking.compare",
        "Say which of two runs or versions is better, and what differs.",
    ),
    "export": ("ops.tracking.export", "Take a registered model out of MLflow: as a directory, GGUF, or to a hub."),
    "report": ("ops.tracking.report", "Write the report of a finished run as a page."),
    "rollback": ("ops.tracking.rollback", "Make the previous champion of a size champion again."),
    "doctor": ("ops.recovery.doctor", "Check limits, leases, locks, states and processes; --fix repairs them."),
    "nightly": ("ops.stack.nightly", "Switch the nightly schedule on or off, or say which it is."),
    "bench": ("bench.train", "Compare the training speed with other trainers."),
}


def _version() -> str:
    """The version of the installed package."""
    try:
        return f"finetune-gpt2-code {metadata.version('finetune-gpt2-code')}"
    except metadata.PackageNotFoundError:
        return "finetune-gpt2-code, not installed: `make install` installs it"


app = App(
    name="finetune",
    help="Fine-tune GPT-2 for code: run by Prefect, remembered by MLflow.",
    help_epilogue="`finetune COMMAND --help` shows the options of a command; docs/commands.md has all of them.",
    help_format="plaintext",
    version=_version,
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # cyclopts would end the process without a word
)


class Value(str):
    """The text of a value; help shows the name of this class."""


def _flow_command(flow: str, text: str) -> Callable[..., int]:
    """A command that runs a flow, with a signature made of the flow's parameters."""

    def command(*words: str, **given: Any) -> int:
        from flows.ahead import helpers_ahead
        from flows.invoke import dry_run, invoke

        config, dry, verbose = (given.pop(name, None) for name in ("config", "dry_run", "verbose"))
        given.pop("debug", None)  # dispatch() has seen to it
        options = {name: str(value).lower() if value in (True, False) else value for name, value in given.items()}
        options = {name: value for name, value in options.items() if value is not None}
        request = parse(words, options, config, flow)
        if dry:
            return dry_run(request)
        with helpers_ahead(request):
            return invoke(request, bool(verbose))

    signature = [*_own_parameters(flow), *_flow_parameters(flow)]
    command.__signature__ = inspect.Signature(signature, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in signature}
    command.__name__, command.__doc__ = ("run" if flow == "finetune" else flow), text
    return command


def _own_parameters(flow: str) -> list[inspect.Parameter]:
    """The words of a command that runs a flow, and its options that are no parameters of the flow."""
    default = "tiny" if flow == "finetune" else "sweep-tiny"
    words = f"a deployment of prefect.yaml ({default} if none is named), and parameters as name=value"
    positional = Annotated[str, Parameter(name="WORDS", help=words)]
    options: list[tuple[str, Any, Any, str]] = [
        ("config", Path | None, None, "YAML file with parameters by name; the command line wins."),
        ("dry_run", bool, False, "Print rows, tokens, steps, memory, disk and time, and stop."),
        ("verbose", bool, False, "Show Prefect's own log too."),
        ("debug", bool, False, "Show the traceback of a mistake."),
    ]
    made = [inspect.Parameter("words", inspect.Parameter.VAR_POSITIONAL, annotation=positional)]
    for name, kind, value, text in options:
        annotation: Any = Annotated[kind, Parameter(help=text, group=_OPTIONS, negative=(), show_default=False)]
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=annotation))
    return made


def _shows(flow: str, name: str, default: Any) -> Callable[[Any], str]:
    """Show the default of the flow's parameter, as the option itself has none, and what is used without a deployment.

    prefect.yaml is read when help is shown.
    """

    def show(_: Any) -> str:
        deployment = DEFAULT_DEPLOYMENTS[flow]
        own = read_parameters(deployment).get(name, default)
        text = "null" if default is None else str(default)
        return text if own == default else f"{text}; deployment {deployment}: {as_setting(own)}"

    return show


def _flow_parameters(flow: str) -> list[inspect.Parameter]:
    """Each parameter of a flow as an option of text: one reader checks all values (flows/arguments.py)."""
    made: dict[str, inspect.Parameter] = {}
    for order, (field, group) in enumerate(job_kind(flow).groups().items(), 1):
        shown = Group(GROUP_TITLES[field], sort_key=order)
        for each in group.declared():
            kind: Any = bool | None if each.annotation is bool else Value | None
            details = Parameter(
                help=each.meaning,
                group=shown,
                show_default=_shows(flow, each.name, each.default),
                allow_leading_hyphen=True,
            )
            option = inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, details]
            )
            made.setdefault(each.name, option)
    return list(made.values())


app.command(_flow_command("finetune", "Fine-tune a model, without servers: tiny, or another deployment."), name="run")
app.command(_flow_command("sweep", "Train a trial for each combination of a grid, publish the best."), name="sweep")
for _name, (_module, _help) in MODULES.items():
    app.command(App(name=_name, help=_help))


@app.command
def up(*, secure: bool = False) -> int:
    """Start Prefect, MLflow, a worker and the watcher, until Ctrl-C.

    Parameters
    ----------
    secure: bool
        Require a password.
    """
    if secure:
        os.environ["FINETUNE_SECURE"] = "1"
    return int(import_module("ops.stack.up").main([]))


@app.command
def down() -> int:
    """End `finetune up`, or the processes that a crash left behind."""
    return int(import_module("ops.stack.up").main(["down"]))


@app.command
def deploy() -> int:
    """Set up the Prefect server of PREFECT_API_URL, if `finetune up` did not start it."""
    _refuse_password()
    # Otherwise each prefect command would start a temporary server and deploy to that.
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
    return int(import_module("ops.stack.deploy").main())


@app.command
def worker() -> int:
    """Start a worker on another machine, for the servers of PREFECT_API_URL and MLFLOW_TRACKING_URI."""
    _need_servers()
    Settings.load().claim_root()  # flow runs would fail one by one
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # s; after three missed ones a run is Crashed
    os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
    os.execv(sys.executable, [sys.executable, "-m", "ops.stack.worker"])


@app.command
def watch() -> int:
    """Start the watcher beside such a worker: it closes the runs of processes that died on this machine."""
    _need_servers()
    return int(import_module("ops.recovery.watch").main())


def _need_servers() -> None:
    if not (os.environ.get("PREFECT_API_URL") and os.environ.get("MLFLOW_TRACKING_URI")):
        raise UsageError(
            "PREFECT_API_URL and MLFLOW_TRACKING_URI must name the servers: `. client.env` sets them, a file that "
            "`finetune up` writes below server in its data root"
        )
    _refuse_password()


def _refuse_password() -> None:
    """Prefect's own commands would log the address."""
    if "@" in os.environ.get("PREFECT_API_URL", "").partition("://")[2].partition("/")[0]:
        raise UsageError(
            "PREFECT_API_URL must not contain a password: set PREFECT_API_AUTH_STRING=user:password instead"
        )


def _run_module(name: str, arguments: Sequence[str]) -> int:
    """Run a command that has its options in its own module."""
    if name in PARSERS:
        PARSERS[name]().parse_args(arguments)  # help or a mistake ends the process before the command is imported
    if name == "doctor":  # of the servers on this machine, unless others are named
        prefect = os.environ.get("FINETUNE_PREFECT_PORT") or "4200"
        mlflow = os.environ.get("FINETUNE_MLFLOW_PORT") or "5000"
        os.environ.setdefault("PREFECT_API_URL", f"http://127.0.0.1:{prefect}/api")
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow}")
    try:
        module = import_module(MODULES[name][0])
    except ModuleNotFoundError as error:
        if error.name != "bench":
            raise
        raise UsageError("finetune bench needs the repository: it is not part of the installed package") from None
    return int(module.main(list(arguments)) or 0)


def _complete(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``run`` before a deployment or a parameter, and the value of a switch joined to it."""
    words = list(arguments)
    first = words[0] if words else "-"
    if not first.startswith("-") and first not in app and ("=" in first or first in read_deployments()):
        words.insert(0, "run")
    switches = {f"--{each.name}" for each in all_parameters(SweepJob) if each.annotation is bool}
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].replace("-", "_").replace("__", "--", 1) in switches and word.lower() in _TRUTHS:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def dispatch(arguments: list[str]) -> int:
    """Run a command. Returns the exit status.

    Raises:
        UsageError: the command line is wrong.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in options:
        os.environ[DEBUG_VARIABLE] = "1"
        arguments = [word for n, word in enumerate(arguments) if word != "--debug" or n >= len(options)]
    if arguments and arguments[0] in MODULES:
        return _run_module(arguments[0], arguments[1:])
    words = _complete(arguments)
    try:
        return int(app(words, exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        raise UsageError(_sentence(error, words)) from None


def _sentence(error: CycloptsError, arguments: Sequence[str]) -> str:
    """The mistake in a command line in one line."""
    text = " ".join(str(error).split())
    if "Unknown command" in text and arguments and arguments[0].startswith("-"):
        return f"there is no option {arguments[0].partition('=')[0]}: `finetune --help` lists them"
    if "Unknown command" in text and arguments:
        near = suggestion(arguments[0], [name for name in app if not name.startswith("-")])
        return f"there is no command {arguments[0]}{near or ': `finetune --help` lists them'}"
    if isinstance(error, UnknownOptionError):
        option = str(error.token.keyword or error.token.value).partition("=")[0] if error.token else ""
        _, _, near = text.partition(" Did you mean ")
        remedy = f"did you mean {near}" if near else f"`finetune {arguments[0]} --help` lists them"
        return f"there is no option {option}: {remedy}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"{error.unused_tokens[0]} is one word too many: `finetune {arguments[0]} --help` shows what is taken"
    return text
