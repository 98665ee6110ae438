"""The data of MLflow runs: the data set as their input, and tables of records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ops.tracking.connection import client
from ops.tracking.runs import RunRef


def log_table(run: RunRef, records: Sequence[Mapping[str, Any]], name: str) -> None:
    """Log records as the artifact ``tables/<name>.json``, which MLflow shows as a table.

    JSON has no infinity and no NaN, and pandas writes null for both: here they are the texts that Python's json
    module and JavaScript have for them (Infinity, -Infinity, NaN). None is null.
    """
    import pandas as pd

    rows = [{name: _infinite_as_text(value) for name, value in record.items()} for record in records]
    table = pd.DataFrame.from_records(rows) if rows else pd.DataFrame({"row": []})
    client(run.tracking_uri).log_table(run.run_id, table, f"tables/{name}.json")


def _infinite_as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def log_data(
    run: RunRef, source: str, revision: str | None, sha256: str, profile: Mapping[str, float] | None = None
) -> None:
    """Log the data set as an input, with a digest over all rows (MLflow's own digest samples the first 10,000).

    Args:
        profile: what is counted of the rows, such as their number in each split.
    """
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException
    from mlflow.types import ColSpec, Schema

    origin = CodeDatasetSource(tags={"source": source, "revision": revision or "local", "sha256": sha256})
    # The table of runs shows the digest, so it is short; the tag data_sha256 has the whole hash.
    schema = Schema([ColSpec("string", "prompt"), ColSpec("string", "completion")])
    dataset = Dataset(
        name=Path(source).name,
        digest=sha256[:12],
        source_type="code",
        source=origin.to_json(),
        schema=json.dumps({"mlflow_colspec": schema.to_dict()}),
        profile=json.dumps(dict(profile or {})),
    )
    inputs = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
    mlflow = client(run.tracking_uri)
    try:
        mlflow.log_inputs(run.run_id, [inputs])
    except MlflowException:
        # MLflow looks the data set up, then inserts it: two runs at once may both insert, and the second one fails.
        mlflow.log_inputs(run.run_id, [inputs])
