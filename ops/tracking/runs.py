"""MLflow runs: one for each flow run, with its parameters, metrics, tags, data set and model."""

from __future__ import annotations

import getpass
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops.machine.process import identify_process
from ops.redaction import redact, redact_error, redacted_errors, without_credentials
from ops.servers import MODEL_TRAINING
from ops.settings import Settings
from ops.text import as_setting
from ops.tracking.connection import client, find_experiment, open_experiment
from ops.tracking.once import create_once
from ops.tracking.provenance import git_sha, installed_packages
from ops.tracking.views import server_of, view_url

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MODEL_PREFIX = "gpt2-code-"  # of registered models; the size follows
TAKEN_OVER_TAG = "taken_over_by"  # of a version: the run that finished what an interrupted one had registered
PROMOTION_TAG = "promotion"  # of a run: the alias that its version got, champion or challenger
PARENT_TAG = "mlflow.parentRunId"  # of a run: the run that it belongs to, beneath which MLflow shows it
REPORT_FILE = "report/report.html"  # of a run
CHANGED_FILE = "changed.json"  # of a run: the parameters that differ from their defaults
PROCESS_TAG = "process"  # of a run: the process that has it open, so that others can see whether it died
EARLY_END_TAG = "early_end"  # of a run: that patience ended its training early, and at which step
RESULT_TAG = "result"  # of a run: whether the tuned model is better than its base
REASON_TAG = "ended_by"  # of a run: why hooks or reaper closed it
_PAGES_PORT = 5000  # of the command that opens the pages of a run without a server
_PAGE = 1000  # runs per request
_PARAM_CHARACTERS = 6000  # MLflow's limit of a parameter's value
_TAG_CHARACTERS = 1000  # of a tag that is text for people


@dataclass(frozen=True)
class RunRef:
    """An MLflow run, as tasks hand it on."""

    tracking_uri: str
    experiment_id: str
    run_id: str

    @property
    def url(self) -> str | None:
        """Its page, if the tracking URI is a server's."""
        server = server_of(self.tracking_uri)
        # Without the type MLflow 3 opens its pages for language-model traces.
        page = f"/#/experiments/{self.experiment_id}/runs/{self.run_id}?{MODEL_TRAINING}"
        return server and server + page

    @property
    def report_url(self) -> str | None:
        """The page of its report, if the tracking URI is a server's."""
        page, question, query = (self.url or "").partition("?")
        return f"{page}/artifacts/{REPORT_FILE}{question}{query}" if page else None

    @property
    def view_url(self) -> str | None:
        """The page of all runs in the view of scores, if the tracking URI is a server's."""
        return view_url(self.tracking_uri, self.experiment_id)

    @property
    def link(self) -> str:
        """Markdown that leads to the run."""
        if self.url:
            return f"[{self.run_id}]({self.url})"
        uri = without_credentials(self.tracking_uri)
        return f"`{self.run_id}` (show it with `mlflow ui --backend-store-uri {uri}`)"


def opening(run: RunRef) -> list[str]:
    """Lines for a terminal: how to open the run's page in MLflow; without a server, how to start one for it."""
    if run.url:
        return [f"page: {run.url}"]
    # `mlflow server` of this Python, as the shell may have none or another version.
    program = shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    uri = shlex.quote(without_credentials(run.tracking_uri))
    local = replace(run, tracking_uri=f"http://127.0.0.1:{_PAGES_PORT}")
    return [f"pages: {program} ui --backend-store-uri {uri} --port {_PAGES_PORT}", f"then: {local.url}"]


def search_runs(tracking_uri: str, condition: str, order_by: list[str] | None = None) -> Iterator[Run]:
    """All runs of the experiment that meet a condition; none where there is no experiment yet.

    Raises:
        RuntimeError: as ``find_experiment``.
    """
    mlflow = client(tracking_uri)
    experiment = find_experiment(mlflow)
    token = None
    while experiment is not None:
        page = mlflow.search_runs(
            [experiment.experiment_id], condition, max_results=_PAGE, order_by=order_by, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def tracked_run(
    settings: Settings,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[RunRef]:
    """Open the MLflow run of a flow run, and close it with the status in which the flow ends.

    An exception makes it FAILED; a signal, a cancellation or an interrupt KILLED. If MLflow does not answer then, the
    flow ends as it would have, and the reaper closes the run later.

    Args:
        params: logged by name; None is logged as "None".
        defaults: of the parameters; those that differ are logged as the file and the tag ``changed``.
    """
    mlflow = client(settings.tracking_uri)
    params = {key: redact(value) if isinstance(value, str) else value for key, value in params.items()}
    changed = {
        key: [params[key], each] for key, each in (defaults or {}).items() if key in params and params[key] != each
    }
    tags = {key: redact(value) for key, value in tags.items()}
    if defaults is not None:
        tags["changed"] = _changes(changed)
    with redacted_errors():
        experiment_id = open_experiment(mlflow, settings)
    run = create_run(mlflow, experiment_id, name, tags)
    ref = RunRef(settings.tracking_uri, experiment_id, run.info.run_id)
    with closed_at_end(mlflow, ref.run_id):
        log_params(ref, params)
        mlflow.log_dict(ref.run_id, dict(params), "config.json")
        if defaults is not None:
            mlflow.log_dict(ref.run_id, changed, CHANGED_FILE)
        mlflow.log_text(ref.run_id, installed_packages(), "constraints.txt")
        yield ref


@contextmanager
def closed_at_end(mlflow: MlflowClient, run_id: str, stops: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Close a run with the status in which the body ends, as ``tracked_run`` says.

    Args:
        stops: exceptions that make it KILLED, as a signal does: another attempt goes on with it.
    """
    status = "KILLED"
    try:
        yield
        status = "FINISHED"
    except stops:
        raise
    except Exception as error:
        status = "FAILED"
        redact_error(error)  # Prefect stores its text as the message of the flow run's state
        raise
    finally:
        try:
            mlflow.set_terminated(run_id, status)
        except Exception as error:
            if status == "FINISHED":
                raise
            logging.getLogger(__name__).warning("MLflow run %s stays open for now: %s", run_id, error)


def delete_run(run: RunRef) -> None:
    """Delete a run in which nothing was done; MLflow keeps it among its deleted runs until `mlflow gc`."""
    client(run.tracking_uri).delete_run(run.run_id)


def create_run(mlflow: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> Run:
    """Create a run once, with the tags that every run has: user, commit, process."""
    sha, process = git_sha(), identify_process().to_json()
    all_tags = {
        **_user(),
        **tags,
        PROCESS_TAG: process,
        **({"git_sha": sha, "mlflow.source.git.commit": sha} if sha else {}),
    }
    start = int(time.time() * 1000)

    def find() -> Run | None:
        condition = f"attributes.start_time = {start} and tags.`{PROCESS_TAG}` = '{process}'"
        found = mlflow.search_runs([experiment_id], condition)
        return found[0] if found else None

    return create_once(lambda: mlflow.create_run(experiment_id, start, all_tags, name), find)


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # in a container a uid may have no name
        return {}


def log_params(run: RunRef, params: Mapping[str, Any]) -> None:
    """Log parameters; they cannot be changed afterwards.

    MLflow cuts or refuses a value that is too long (mlflow#6183). It is shortened here, and ends with the name of the
    artifact that has all of it.
    """
    from mlflow.entities import Param

    mlflow = client(run.tracking_uri)
    texts = {key: str(value) for key, value in params.items()}
    for key, text in texts.items():
        if len(text) > _PARAM_CHARACTERS:
            file = f"params/{key}.txt"
            mlflow.log_text(run.run_id, text, file)
            end = f"... ({len(text):,} characters: the artifact {file} has all of them)"
            texts[key] = text[: _PARAM_CHARACTERS - len(end)] + end
    mlflow.log_batch(run.run_id, params=[Param(key, text) for key, text in texts.items()])


def _changes(changed: Mapping[str, Sequence[Any]]) -> str:
    """Parameters that differ from their defaults, for a tag."""
    return brief(", ".join(f"{name}={as_setting(value)}" for name, (value, _) in changed.items()) or "nothing")


def brief(text: str) -> str:
    """A text for a tag, cut where it is long."""
    return text if len(text) <= _TAG_CHARACTERS else f"{text[:_TAG_CHARACTERS]}..."


def set_tags(run: RunRef, tags: Mapping[str, str]) -> None:
    """Set or replace tags."""
    from mlflow.entities import RunTag

    client(run.tracking_uri).log_batch(run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_metrics(run: RunRef, metrics: Mapping[str, float], step: int, model_id: str | None = None) -> None:
    """Log metrics at a step, of the run and, with ``model_id``, of its model."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    batch = [
        Metric(key, float(value), now, step, model_id=model_id, run_id=run.run_id if model_id else None)
        for key, value in metrics.items()
    ]
    client(run.tracking_uri).log_batch(run.run_id, metrics=batch)
