"""The way of a training's journal and results to its MLflow run: each line once, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from model.engine.journal import read_journal
from model.files import write_json
from model.records import read_record
from ops.courier import Courier
from ops.redaction import without_credentials
from ops.text import one_line
from ops.tracking.connection import client
from ops.tracking.runs import RunRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REASON = 300  # characters of MLflow's own message
_BATCH = 1000  # metrics per request, MLflow's limit
_log = logging.getLogger(__name__)
# An attempt that ended may have left its thread in a request: the next attempt must not send the same lines.
_shipping = threading.Lock()


class NotLoggedError(RuntimeError):
    """A training is finished, and MLflow could not take its results; the message says where they are."""


@contextmanager
def must_be_logged(tracking_uri: str, training: Path) -> Iterator[None]:
    """Around what follows a training: trouble with MLflow is no loss, as the training can be taken over.

    Args:
        training: the training's directory.

    Raises:
        NotLoggedError: MLflow refused a request, or did not answer.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        reason = one_line(error)[:_REASON]
        raise NotLoggedError(
            f"the training is finished and its checkpoints are in {training}, but MLflow at "
            f"{without_credentials(tracking_uri)} has not taken all of it: {reason}"
        ) from error


class Shipped(BaseModel):
    """How many lines of a journal an MLflow run has."""

    lines: int = Field(ge=0, strict=True)


class JournalShipper:
    """Sends a training's journal to an MLflow run, each line once.

    A file beside the journal, one for each run, keeps the number of lines sent: a retried task continues after them,
    and a new run that resumes the training gets the whole journal. If that file is damaged, MLflow is asked.
    """

    def __init__(self, run: RunRef, journal: Path):
        self.run = run
        self.journal = journal
        self.progress = journal.with_name(f"shipped-{run.run_id}.json")

    def in_background(self, every_seconds: float = 5.0) -> Courier[Any]:
        """A courier that ships at each offer, and at most once in ``every_seconds``.

        The training goes on at full speed when MLflow does not answer; the metrics stay in the journal meanwhile.
        """
        trouble = f"metrics stay in {self.journal} for now"
        return Courier(lambda offered: self.ship(), "ship-journal", trouble, _log, every_seconds)

    def ship(self) -> None:
        """Ship every line not yet sent.

        Raises:
            MlflowException: the tracking server cannot be reached; nothing is lost.
            ValueError: a line of the journal is damaged.
        """
        from mlflow.entities import Metric

        with _shipping:
            mlflow = client(self.run.tracking_uri)
            sent = self._sent(mlflow)
            records = read_journal(self.journal, sent)
            batch: list[Metric] = []
            for index, record in enumerate(records, 1):
                batch += [Metric(k, v, record["time"], record["step"]) for k, v in record["metrics"].items()]
                full = index == len(records) or len(batch) + len(records[index]["metrics"]) > _BATCH
                if full:
                    mlflow.log_batch(self.run.run_id, metrics=batch)
                    write_json(self.progress, {"lines": sent + index})
                    batch = []

    def finish(self) -> None:
        """Ship the rest of a journal that is complete now.

        Raises:
            MlflowException, ValueError: as ``ship``.
        """
        lines = len(read_journal(self.journal))
        if self.progress.exists() and self._sent(client(self.run.tracking_uri)) > lines:
            self.progress.unlink()  # it counts lines that there never were
            write_json(self.progress, {"lines": self._count(client(self.run.tracking_uri))})
        self.ship()

    def _sent(self, mlflow: MlflowClient) -> int:
        if not self.progress.exists():
            return 0
        try:
            return read_record(self.progress, Shipped).lines
        except ValueError as error:
            _log.warning("%s: MLflow is asked for what it has", error)
            return self._count(mlflow)

    def _count(self, mlflow: MlflowClient) -> int:
        """The lines at the journal's beginning that MLflow has."""
        lines = read_journal(self.journal)
        names = {name for line in lines for name in line["metrics"]}
        run = self.run.run_id
        there = {(name, point.step) for name in names for point in mlflow.get_metric_history(run, name)}
        for number, line in enumerate(lines):
            if any((name, line["step"]) not in there for name in line["metrics"]):
                return number
        return len(lines)
