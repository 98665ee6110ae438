"""A flow run in this process, without servers: what is checked before, and what is printed."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from flows.arguments import Request, complaint, wrong_paths
from flows.local import embed, start
from flows.terminal import open_display, show_logs
from ops.display import Display, show_on
from ops.machine.stopping import insistent_signals
from ops.mistakes import MACHINE, UsageError, exit_status, sentence
from ops.settings import DataRootError, Settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_INTERRUPTED = "interrupted: the same command goes on from what is done"


def check(request: Request) -> None:
    """Refuse what is wrong before anything slow is imported or started.

    Raises:
        UsageError: a parameter, or a local path that it names.
    """
    if wrong := complaint(request.parameters, request.flow) or wrong_paths(request.parameters, request.flow):
        raise UsageError(wrong)


def dry_run(request: Request) -> int:
    """Print what a run would need. Returns the exit status."""
    check(request)
    from flows.dry_run import show_estimate

    show_estimate(request)
    return 0


def invoke(request: Request, verbose: bool = False) -> int:
    """Run a flow with the parameters of a request. Returns the exit status.

    Args:
        verbose: show Prefect's log too, as Prefect does.

    Raises:
        UsageError, DataRootError, RuntimeError: the run cannot start.
        SystemExit: a signal asked the process to end.
    """
    check(request)
    shown = Display() if verbose else open_display()
    show_on(shown)
    try:
        return _invoke(request, shown, verbose)
    except (KeyboardInterrupt, SystemExit) as interruption:
        print(shown.kept or _INTERRUPTED, file=sys.stderr)
        if isinstance(interruption, SystemExit):
            raise
        return 128 + signal.SIGINT


def _invoke(request: Request, shown: Display, verbose: bool) -> int:
    """Start what a flow needs, run it, and print how it ended. Returns the exit status."""
    begun = time.perf_counter()
    with contextlib.closing(shown):
        shown.line("importing torch and Prefect, and starting Prefect's temporary server ...")
        with insistent_signals():
            _start(request)
            if request.flow == "sweep":
                from flows.sweep import sweep as function
            else:
                from flows.finetune import finetune as function
        if not verbose:
            show_logs(shown)
        started = time.perf_counter()
        shown.phase("start", started - begun)
        state: State[Any] = function(**request.parameters, return_state=True)  # type: ignore[assignment]
    seconds = {"start": started - begun, "prefect": time.perf_counter() - started}
    if state.is_failed():
        return _print_failure(state)
    _print_result(state, seconds)
    return 0


def _start(request: Request) -> None:
    """Read the settings, and start what a flow needs in this process.

    Raises:
        UsageError: a setting is wrong.
        DataRootError: a file of the data root cannot be written.
        DatabaseError: a database cannot be used.
        RuntimeError: the temporary server does not start.
    """
    try:
        settings = Settings.load()
    except ValueError as error:
        raise UsageError(sentence(error)) from error
    try:
        embed(settings)
        start(Settings.load(), request.parameters.get("weights_dir"))  # again: embed has changed the environment
    except OSError as error:
        raise DataRootError.of(settings.data_root, error) from error


def _print_failure(state: State[Any]) -> int:
    """Print why a flow run failed, in a sentence; of a bug, the log has the traceback. Returns the exit status."""
    error = state.result(raise_on_failure=False)
    status = exit_status(error) if isinstance(error, BaseException) else None
    print(state.message if status else f"{state.name}: {state.message}", file=sys.stderr)
    return status or MACHINE


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
    else:
        print(f"model: {result.model}; `finetune sample` asks it, `finetune report {result.model}` shows its scores")
    print("\n".join(opening(result.run)))
    print(f"tracking: {result.run.tracking_uri}")
    print(f"run: {result.run.run_id}")
