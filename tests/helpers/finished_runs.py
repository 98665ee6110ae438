"""Finished runs in MLflow without a training: records of test rows, a journal, parameters."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.data import log_table
from ops.tracking.runs import RunRef, log_metrics, log_params, tracked_run

HOSTILE = (
    '<script>document.title = "hacked"</script>',
    '"><img src="http://127.0.0.1:9/pixel" onerror="document.title=1">',
    "</pre></main></body></html>",
    "{{ 7 * 7 }} {% include 'x' %}",
    "\u202eright to left\x00\ud83d",
    "x" * 5_000,
    "&amp;<" * 1_000,
    'a"' * 1_000,
    "",
)


def make_records(
    count: int, gain: float = 0.5, seed: int = 0, first: int = 0, texts: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Records as ``model.evaluation.records`` makes them.

    Args:
        gain: by how much the loss of each token falls on the average, in nats; the spread is 0.1.
        seed: of losses and scores.
        first: number of the first row; rows of equal number have equal content.
        texts: prompts, references and completions, in turn; plain code without any.
    """
    draw = random.Random(seed)
    records = []
    for index in range(first, first + count):
        tokens = 10 + index % 30
        base = tokens * (2 + 0.1 * (index % 7))
        record: dict[str, Any] = {
            "key": f"{index:016x}",
            "row": index,
            "family": None,
            "prompt": texts[index % len(texts)] if texts else f"Add {index} to x.",
            "reference": texts[(index + 1) % len(texts)] if texts else f"def f(x):\n    return x + {index}",
            "tokens": tokens,
            "bytes": 3 * tokens,
            "base_text": texts[(index + 2) % len(texts)] if texts else f"f(x)\n    {index}",
            "text": texts[(index + 3) % len(texts)] if texts else f"def f(x):\n    return {index}",
        }
        for side, loss in (("base_", base), ("", base - tokens * draw.gauss(gain, 0.1))):
            record |= {
                f"{side}loss": loss,
                f"{side}stopped": draw.random() < 0.8,
                f"{side}syntax": None,
                f"{side}chrf": draw.uniform(0, 100),
                f"{side}exact": False,
                f"{side}repetition": 0.0,
                f"{side}empty": False,
                f"{side}length": 40,
                f"{side}passed": False,
                f"{side}failure": "SyntaxError: invalid syntax (<unknown>, line 3)",
            }
        records.append(record)
    return records


def log_finished(
    settings: Settings,
    name: str,
    records: Sequence[Mapping[str, Any]] | None,
    params: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> RunRef:
    """A FINISHED run with what the flow logs.

    Args:
        records: of the test rows; None leaves the table out.
        params: in place of the defaults ``epochs=3`` and ``model_size=tiny``.
        data: the facts ``data/...``.
    """
    defaults = {"model_size": "tiny", "dataset": "demo", "epochs": 3, "seed": 42}
    with tracked_run(settings, name, defaults | dict(params or {}), {"data_sha256": "ab" * 32}, defaults) as run:
        log_params(run, {"data/train_rows": 60, "data/dropped/empty_prompt": 2} | dict(data or {}))
        log_metrics(run, {"best/eval_loss": 1.5, "best/step": 20, "untuned/eval_loss": 2.5}, 0)
        if records is not None:
            log_table(run, records, "test_rows")
        log_table(run, [{"file": "rows.jsonl", "split": "train", "rows": 60}], "data_files")
        journal = settings.data_root / "metrics.jsonl"
        lines = [
            {"step": step, "time": 1, "metrics": {"train/loss": 3 / (1 + step), "eval/loss": 2.5 / (1 + step)}}
            for step in range(0, 30, 10)
        ]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        client(run.tracking_uri).log_artifact(run.run_id, str(journal))
    return run


def own_settings(folder: Path, database: Path) -> Settings:
    """A data root with a copy of an empty MLflow database."""
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "mlflow.db").write_bytes(database.read_bytes())
    return Settings(folder, f"sqlite:///{folder}/mlflow/mlflow.db")
