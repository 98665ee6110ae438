"""``python -m flows [deployment] [name=value ...]``: the flow in this process, with no server and no account.

The parameters are those of a deployment in prefect.yaml, ``tiny`` unless named, which needs no hub either.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows.commands import UsageError, read_flow, read_parameters
from flows.job import refused_values, unknown_parameters
from flows.local import embed, end_in_order, start
from flows.trials import SweepJob, job_kind, refused_grid
from model.yaml_text import parse_yaml
from ops.settings import Settings
from ops.text import escape_output, storable, unreadable_argument

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command line: those of its deployment, changed by its ``name=value``.

    Raises:
        UsageError: two deployments, a parameter given twice, or a value that is not text or not YAML.
    """
    for argument in arguments:
        if reason := unreadable_argument(argument):
            raise UsageError(f"{storable(argument)} {reason}")
    parameters = read_parameters(_deployment(arguments))
    changes: dict[str, Any] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            continue
        if name in changes:
            raise UsageError(f"{_brief(name)} is given twice")
        try:
            changes[name] = parse_yaml(value)
        except ValueError:
            raise UsageError(f"{_brief(argument)}: the value is not YAML; quote it") from None
    return parameters | changes


def _deployment(arguments: Sequence[str]) -> str:
    """The deployment that a command line names."""
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) > 1:
        raise UsageError(f"one deployment at a time, not {_brief(', '.join(named))}; parameters are name=value")
    return named[0] if named else "tiny"


def _brief(typed: str) -> str:
    """What was typed, for a message: on one line, and cut where it is long."""
    line = " ".join(typed.split())
    return line if len(line) < 100 else f"{line[:100]}..."


def complaint(parameters: Mapping[str, Any], flow: str = "finetune") -> str | None:
    """What is wrong with a flow's parameters, by name; None if nothing is."""
    kind = job_kind(flow)
    if unknown := unknown_parameters(parameters, kind):
        return f"no parameter is called {_brief(', '.join(unknown))}: README.md lists them"
    for name, value in parameters.items():
        if isinstance(value, str) and storable(value) != value:
            return f"{name} has a character that is no text: {_brief(storable(value))}"
    refused = "; ".join(refused_values(parameters, kind))
    return refused or (refused_grid(parameters) if kind is SweepJob else None)


def _start() -> None:
    """Read the settings, and start what the flow needs in this process.

    Raises:
        UsageError: a setting is wrong, or a file of the data root cannot be written.
    """
    try:
        embed(Settings.load())
        start(Settings.load())  # again: embed has changed the environment
    except OSError as error:
        raise UsageError(
            f"the run cannot start in {os.environ.get('FINETUNE_DATA_ROOT') or '.data'}: {error}"
        ) from error
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def main(arguments: list[str]) -> int:
    """Run the flow with a deployment's parameters, some of them changed. Returns the exit status."""
    begun = time.perf_counter()
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\nREADME.md has all parameters.")
        return 0
    try:
        parameters = parse(arguments)
        flow = read_flow(_deployment(arguments))
        if wrong := complaint(parameters, flow):
            raise UsageError(wrong)
        _start()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2

    if flow == "sweep":
        from flows.sweep import sweep as function
    else:
        from flows.finetune import finetune as function

    started = time.perf_counter()
    state: State[Any] = function(**parameters, return_state=True)  # type: ignore[assignment]
    seconds = {"start": started - begun, "prefect": time.perf_counter() - started}
    if state.is_failed():  # the log has the traceback
        print(f"{state.name}: {state.message}", file=sys.stderr)
        return 1
    _print_result(state, seconds)
    return 0


def _print_result(state: State[Any], seconds: dict[str, float]) -> None:
    """Print what the flow run left behind; the last two lines are for scripts.

    Args:
        seconds: until the flow began, and from there to its end.
    """
    from flows.summary import before_and_after, time_table, trial_table
    from flows.sweep import SweepResult
    from ops.tracking.runs import opening

    result = state.result()
    if result is None:  # a night without work
        print(f"{state.name}: {state.message}")
        return
    if isinstance(result, SweepResult):
        print(trial_table(result.trials))
    print(before_and_after(result.metrics, result.differences, result.samples))
    seconds["prefect"] -= sum(result.seconds.values())
    print(time_table(seconds | result.seconds))
    if result.verdict:
        print(f"{'champion' if result.verdict.promoted else 'challenger'}: {result.model}, {result.verdict.reason}")
    print("\n".join(opening(result.run)))
    print(f"tracking: {result.run.tracking_uri}")
    print(f"run: {result.run.run_id}")


def open_streams() -> None:
    """Open /dev/null for a standard stream that is closed: the next file would get its number.

    The temporary server inherits the streams, and ends at once if one of them is another file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # os.open makes it for this process only


if __name__ == "__main__":
    open_streams()
    escape_output()
    end_in_order()
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of the output has gone; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where the training stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
