"""A ready-made view of the runs in MLflow, in the menu "Views" of the page of runs.

MLflow 3.17 keeps saved views as tags of the experiment, and lists them by name. It opens none by itself: a view is
chosen from the menu or by a link.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ops.redaction import without_credentials
from ops.servers import MODEL_TRAINING

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW = "finetune-scores"
_TAG = f"mlflow.sharedViewState.{VIEW}"
_NAME = "Scores"
_NOTE_TAG = "mlflow.note.content"
_DESCRIPTION = (
    "GPT-2 fine-tuned on code instructions by the flows `finetune` and `sweep`: one run for each flow run, and "
    "beneath a sweep's run one for each trial. The tag `result` compares the tuned model with its base on the test "
    "split, the tag `changed` has the parameters that differ from their defaults. The menu *Views* has a view that "
    "begins with the results. Losses are nats per response token; `untuned/...` is the base's value."
)
# Columns of the table, beside the run's name and time.
_COLUMNS = (
    "tags.`result`",
    "tags.`changed`",
    "metrics.`test/loss`",
    "metrics.`best/eval_loss`",
    "metrics.`sample/pass_rate`",
    "metrics.`sample/chrf`",
    "metrics.`sample/syntax_rate`",
    "metrics.`sample/stop_rate`",
)
# Sections of the charts, with the metrics of each; MLflow appends the sections of all other metrics.
_SECTIONS = {
    "Scores on the test split": (
        "test/loss",
        "sample/pass_rate",
        "sample/chrf",
        "sample/syntax_rate",
        "sample/stop_rate",
        "best/eval_loss",
    ),
    "Loss curves": ("eval/loss", "train/loss"),
}
_CURVES = ("eval/loss", "train/loss")


def server_of(tracking_uri: str) -> str | None:
    """What the addresses of MLflow's pages begin with, without a password; None if the URI is no server's."""
    return without_credentials(tracking_uri).rstrip("/") if tracking_uri.startswith("http") else None


def view_url(tracking_uri: str, experiment_id: str) -> str | None:
    """The page of runs in the ready-made view, if the tracking URI is a server's."""
    server = server_of(tracking_uri)
    return server and (
        f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&compareRunsMode=TABLE&{MODEL_TRAINING}"
    )


def provide_view(mlflow: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> None:
    """Store the view in the experiment, unless it is there already, and describe the experiment unless somebody has.

    Args:
        tags: of the experiment.
    """
    if not tags.get(_NOTE_TAG):
        mlflow.set_experiment_tag(experiment_id, _NOTE_TAG, _DESCRIPTION)
    state = _packed(_state())
    try:
        if json.loads(tags[_TAG])["state"] == state:
            return
    except (KeyError, TypeError, ValueError):
        pass  # there is none, or it is damaged
    now = int(time.time() * 1000)
    view = {"name": _NAME, "createdAt": now, "updatedAt": now, "state": state}
    mlflow.set_experiment_tag(experiment_id, _TAG, json.dumps(view))


def _packed(state: Mapping[str, Any]) -> str:
    """A view's state as MLflow's pages store it."""
    return f"deflate;{base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()}"


def _state() -> dict[str, Any]:
    """The state of MLflow's page of runs: filter and order, columns, charts in sections."""
    charts = [
        _chart(section, metric, number)
        for section, metrics in _SECTIONS.items()
        for number, metric in enumerate(metrics)
    ]
    sections = [
        {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
        for name in _SECTIONS
    ]
    return {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "columnWidths": {"tags.`result`": 260, "tags.`changed`": 200},
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
    }


def _chart(section: str, metric: str, number: int) -> dict[str, Any]:
    """A line for a curve, bars for a single value. MLflow shows the metric's own name with its section elsewhere."""
    common = {
        "uuid": f"{section}-{number}",
        "runsCountToCompare": 10,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": True,
        "displayName": metric,
        "metricKey": metric,
    }
    if metric not in _CURVES:
        return {**common, "type": "BAR"}
    return {
        **common,
        "type": "LINE",
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
