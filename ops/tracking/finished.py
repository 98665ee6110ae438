"""A finished run as MLflow has it: parameters, scores, journal, and the records of its test rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, with_config
from typing_extensions import TypedDict

from model.engine.journal import JournalLine, read_journal
from model.evaluation.scores import HUMANEVAL, SCOREBOARD, UNTUNED, Score
from model.records import check_record, parse_record
from ops.redaction import without_credentials
from ops.tracking.connection import client, require_runs
from ops.tracking.registry import find_version, finishing_run, version_uri
from ops.tracking.runs import CHANGED_FILE, RunRef

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1e30  # score of a row
_AS_SETTINGS = {"None": "null", "True": "true", "False": "false"}  # MLflow has the texts of Python
_INFINITE = ("Infinity", "NaN")  # how ``log_table`` writes losses that are not finite
TASKS_TABLE = "tables/humaneval.json"
ROWS_TABLE, FILES_TABLE, JOURNAL_FILE = "tables/test_rows.json", "tables/data_files.json", "metrics.jsonl"


@dataclass(frozen=True)
class FinishedRun:
    """What a page says of a run.

    Attributes:
        ref: the MLflow run.
        name: of the run.
        asked: how the user named it: an id or a ``models:/`` URI.
        status: as MLflow has it.
        started: in UTC.
        params, metrics, tags: as logged; parameters are texts, as ``as_setting`` writes them.
        journal: the training's metrics, a line for each step that has some.
        records: one for each test row; None where the run has none with content keys.
        tasks: one record for each task of HumanEval; empty where it was not run.
        files: the files of the data set, with their splits and rows.
        changed: parameter -> (value, default), of those that differ; None where it was not recorded.
        versions: the registered versions of this run, as ``models:/`` URIs.
    """

    ref: RunRef
    name: str
    asked: str
    status: str
    started: datetime
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    journal: list[JournalLine] = field(default_factory=list)
    records: list[dict[str, Any]] | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, tuple[Any, Any]] | None = None
    versions: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """The run's seed, which its own intervals were drawn with."""
        text = self.params.get("seed", "")
        return int(text) if text.isdecimal() else 0

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a metric of the journal."""
        return [(line["step"], line["metrics"][metric]) for line in self.journal if metric in line["metrics"]]

    def fact(self, name: str) -> str:
        """A fact that runs of this version log as a parameter, and earlier ones as a metric; empty if unknown."""
        if name in self.params:
            return self.params[name]
        return f"{self.metrics[name]:g}" if name in self.metrics else ""


def resolve(tracking_uri: str, name: str) -> str:
    """The id of the run that an id, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` means.

    Raises:
        ValueError: the name has another form.
        LookupError: there is no such version.
    """
    is_version = name.startswith("models:/")
    if not is_version and not _RUN_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is none of a run id (32 hexadecimal digits), models:/NAME/VERSION and models:/NAME@ALIAS"
        )
    require_runs(tracking_uri)
    if is_version:
        return finishing_run(find_version(client(tracking_uri), name, "run", "a run id (32 hexadecimal digits), "))
    return name


def read_run(tracking_uri: str, name: str) -> FinishedRun:
    """Read a run from MLflow; what it does not have is empty.

    Args:
        name: a run id, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Raises:
        ValueError: the name has another form, or what the run has is damaged.
        LookupError: there is no such run or version.
        MlflowException: the server cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    run_id = resolve(tracking_uri, name)
    mlflow = client(tracking_uri)
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise LookupError(
            f"there is no run {run_id} at {without_credentials(tracking_uri)}: take an id from a run's page, or set "
            "MLFLOW_TRACKING_URI to the server that has it"
        ) from None
    with _artifacts(mlflow, run_id) as files:
        return _finished(mlflow, run, tracking_uri, name, files)


@contextmanager
def _artifacts(mlflow: MlflowClient, run_id: str) -> Iterator[dict[str, Path]]:
    """The run's files that a page needs, by their paths in MLflow, as far as the run has them."""
    there = {file.path for folder in (None, "tables") for file in mlflow.list_artifacts(run_id, folder)}
    with TemporaryDirectory() as scratch:
        wanted = sorted({ROWS_TABLE, TASKS_TABLE, FILES_TABLE, JOURNAL_FILE, CHANGED_FILE} & there)
        yield {path: Path(mlflow.download_artifacts(run_id, path, scratch)) for path in wanted}


def _finished(mlflow: MlflowClient, run: Run, tracking_uri: str, asked: str, files: dict[str, Path]) -> FinishedRun:
    run_id, data = run.info.run_id, run.data
    versions = mlflow.search_model_versions(f"run_id = '{run_id}'")
    return FinishedRun(
        ref=RunRef(tracking_uri, run.info.experiment_id, run_id),
        name=run.info.run_name or run_id,
        asked=asked,
        status=run.info.status,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        params={name: _AS_SETTINGS.get(value, value) for name, value in data.params.items()},
        metrics={_today(name): value for name, value in data.metrics.items()},
        tags=dict(data.tags),
        journal=read_journal(files[JOURNAL_FILE]) if JOURNAL_FILE in files else [],
        records=_records(files.get(ROWS_TABLE), f"{ROWS_TABLE} of the run {run_id}"),
        tasks=_tasks(files.get(TASKS_TABLE), f"{TASKS_TABLE} of the run {run_id}"),
        files=_table(files.get(FILES_TABLE), f"{FILES_TABLE} of the run {run_id}"),
        changed=_changed(files.get(CHANGED_FILE), f"{CHANGED_FILE} of the run {run_id}"),
        versions=tuple(version_uri(version) for version in versions),
    )


def _today(metric: str) -> str:
    """The present name of a metric: earlier runs have the base's values as ``base/...``."""
    return f"{UNTUNED}{metric.removeprefix('base/')}" if metric.startswith("base/") else metric


class _Table(TypedDict):
    """A table as MLflow keeps it: pandas' orientation "split"."""

    columns: list[str]
    data: list[list[Any]]


@with_config(extra="allow")
class _Record(TypedDict):
    """What every record of a test row has; beside it stand the scores, which are numbers or null."""

    key: str
    row: int
    family: str | None
    prompt: str
    reference: str
    tokens: Annotated[int, Field(gt=0, le=2**31)]
    bytes: Annotated[int, Field(ge=0, le=2**40)]
    base_text: str | None
    text: str | None


def _table(path: Path | None, what: str) -> list[dict[str, Any]]:
    """The rows of a table, empty where the file is missing.

    Raises:
        ValueError: it is damaged.
    """
    if path is None:
        return []
    table = parse_record(path.read_bytes(), _Table, what)
    if any(len(row) != len(table["columns"]) for row in table["data"]):
        raise ValueError(f"{what} is damaged: it has rows of another length than its header")
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _records(path: Path | None, what: str) -> list[dict[str, Any]] | None:
    """The records of the test rows; None where there are none with content keys.

    Raises:
        ValueError: the table is damaged.
    """
    found = _table(path, what)
    if not found or "key" not in found[0]:
        return None
    check_record(found, list[_Record], what)
    for record in found:
        for name in ("base_loss", "loss"):
            # Every row has a loss. Earlier runs have null for one that is not finite.
            if name in record and record[name] in (None, *_INFINITE):
                record[name] = math.inf
    _check_scores(found, SCOREBOARD, what)
    return found


def _tasks(path: Path | None, what: str) -> list[dict[str, Any]]:
    """The records of HumanEval's tasks, which are joined like rows.

    Raises:
        ValueError: the table is damaged.
    """
    # They have no loss: tokens and bytes, by which losses are joined, are equal.
    found = [{**record, "tokens": 1, "bytes": 1, "family": None} for record in _table(path, what)]
    check_record(found, list[_Record], what)
    _check_scores(found, HUMANEVAL, what)
    return found


def _check_scores(records: Sequence[dict[str, Any]], scoreboard: Sequence[Score], what: str) -> None:
    """Refuse scores that are neither numbers nor null, and finite ones whose sum may be infinite.

    Raises:
        ValueError: the message names the row.
    """
    names = {f"{side}{score.column}" for score in scoreboard for side in ("base_", "")}
    for record in records:
        for name in names & record.keys():
            value = record[name]
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{what} is damaged: {name} of row {record['row']} is no number")
            if value is not None and _LARGEST < abs(value) < math.inf:
                raise ValueError(f"{what} is damaged: {name} of row {record['row']} is larger than {_LARGEST:g}")


def _changed(path: Path | None, what: str) -> dict[str, tuple[Any, Any]] | None:
    if path is None:
        return None
    return parse_record(path.read_bytes(), dict[str, tuple[Any, Any]], what)
