"""The way of a training's journal to its MLflow run: each line once, in a thread of its own."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

from model.engine.journal import read_journal
from model.files import write_json
from ops.courier import Courier
from ops.tracking.runs import RunRef, client

_BATCH = 1000  # metrics per request, MLflow's limit
_log = logging.getLogger(__name__)
# An attempt that ended may have left its thread in a request: the next attempt must not send the same lines.
_shipping = threading.Lock()


class JournalShipper:
    """Sends a training's journal to an MLflow run, each line once.

    A file beside the journal, one for each run, keeps the number of lines sent: a retried task continues after them,
    and a new run that resumes the training gets the whole journal.
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
        """
        from mlflow.entities import Metric

        with _shipping:
            sent = json.loads(self.progress.read_text())["lines"] if self.progress.exists() else 0
            records = read_journal(self.journal, sent)
            mlflow = client(self.run.tracking_uri)
            batch: list[Metric] = []
            for index, record in enumerate(records, 1):
                batch += [Metric(k, v, record["time"], record["step"]) for k, v in record["metrics"].items()]
                full = index == len(records) or len(batch) + len(records[index]["metrics"]) > _BATCH
                if full:
                    mlflow.log_batch(self.run.run_id, metrics=batch)
                    write_json(self.progress, {"lines": sent + index})
                    batch = []
