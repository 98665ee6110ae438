"""Hooks that Prefect calls when a flow run ends badly: they close its MLflow run and send a notice.

The flow closes its own MLflow run. These hooks are for the cases in which it could not. After kill -9 Prefect's
worker calls them, in a process of its own. Prefect passes the arguments by name.
"""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import deployment
from prefect.states import Failed

from flows.arguments import complaint
from flows.job import unknown_parameters
from flows.trials import job_kind
from ops.notify import notify
from ops.recovery.reaper import close_run, complete_flow_run, has_finished, is_retried, runs_of
from ops.settings import Settings
from ops.threads import in_daemon_thread
from ops.tracking.runs import REASON_TAG, RunRef

_MLFLOW_SECONDS = 10.0  # after that the reaper closes the run
_MESSAGE = 500  # characters


def after_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """An exception: FAILED, and a notice."""
    _end(flow, flow_run, state, "FAILED", "failed")


def after_crash(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A signal, or a process that died: KILLED, and a notice; unless all was done. A wrong parameter is named."""
    state = _explain_parameters(flow, flow_run) or state
    _end(flow, flow_run, state, "KILLED", "crashed")


def _explain_parameters(flow: Flow[Any, Any], flow_run: FlowRun) -> State[Any] | None:
    """Set the state of a run with an unknown parameter to Failed, by name: Prefect says "exit code 1" only.

    Its server lets unknown parameters pass, and its engine fails with them before the flow begins.
    """
    unknown = unknown_parameters(flow_run.parameters, job_kind(flow.name))
    if not unknown:
        return None
    state: State[Any] = Failed(message=complaint({name: None for name in unknown}, flow.name))
    flow_run_logger(flow_run, flow).error(state.message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run.id, state, force=True)
    return state


def after_cancellation(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A cancellation by a user: KILLED, and no notice."""
    _end(flow, flow_run, state, "KILLED", None)


def _end(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any], status: str, word: str | None) -> None:
    log = flow_run_logger(flow_run, flow)
    found: list[tuple[RunRef, bool]] = []
    names: list[str] = []  # the flow gives both runs a name; the worker knows the one that Prefect had given
    finished: list[bool] = []

    def close() -> None:
        uri = Settings.load().tracking_uri
        for run in runs_of(uri, str(flow_run.id)):
            finished.append(has_finished(run, flow_run))
            ref = RunRef(uri, run.info.experiment_id, run.info.run_id)
            names.append(run.info.run_name or flow_run.name)
            found.append((ref, REASON_TAG in run.data.tags and not is_retried(run, flow_run)))
            if close_run(ref, status, f"Prefect: {state.name}"):  # a reaper may have failed after it had set the tag
                found[-1] = ref, False

    closing = in_daemon_thread(close, "close-mlflow-run")
    wait([closing], _MLFLOW_SECONDS)
    if closing.done() and (error := closing.exception()):
        log.warning("the reaper will close MLflow's run: %s", error)
    if state.is_crashed() and any(finished):
        with get_client(sync_client=True) as client:
            complete_flow_run(client, flow_run.id)
        return
    # The reaper has sent a notice when it closed this attempt's run.
    if word is None or any(reaped for _, reaped in found):
        return
    name = f"{flow.name}/{deployment.name}" if deployment.name else flow.name
    message = (state.message or "").strip()[:_MESSAGE]
    notify(
        f"{name} {word}: {[*names, flow_run.name][0]}",
        [message] if message else [],
        {"MLflow run": found[0][0].url if found else None},
        str(flow_run.id),
    )
