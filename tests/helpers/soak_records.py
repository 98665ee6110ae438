"""What a soak compares: all that MLflow has of its stages, without times and speeds, and what is left over."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.artifacts
import numpy as np
from made_up import MadeUp

from ops.machine.lock_file import read_locks
from ops.tracking.connection import client
from ops.tracking.flavour import hash_version
from ops.tracking.models import file_hashes

MODEL = "gpt2-code-tiny"
# Metrics that depend on speed, on memory, or on what an interrupted attempt had already done.
_NOT_COMPARED = (
    "wall_seconds/",
    "train/tokens_per_second",
    "train/mfu",
    "train/first_step",
    "train/peak",
    "train/trunk_hit",
)
_TAGS = ("subset", "nightly", "nightly.fresh", "nightly.replay", "promotion", "promotion_reason")
_ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
Points = dict[str, list[tuple[int, float]]]


def runs_of(made: MadeUp, flow_runs: Sequence[str]) -> list[Any]:
    """The MLflow runs of some flow runs, oldest first."""
    server = client(made.mlflow)
    experiment = server.get_experiment_by_name("finetune")
    found = (
        server.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []
    )
    return [run for run in found if run.data.tags.get("prefect.flow_run_id") in flow_runs]


def points_of(made: MadeUp, run: Any) -> Points:
    """Every point of every metric of a run that does not depend on speed: step and value, in the order of steps."""
    server = client(made.mlflow)
    names = [name for name in sorted(run.data.metrics) if not name.startswith(_NOT_COMPARED)]
    return {
        name: sorted((p.step, p.value) for p in server.get_metric_history(run.info.run_id, name)) for name in names
    }


def counts(run: Any) -> bool:
    """Whether a run is the one that completed its stage: FINISHED, or killed after its version became champion."""
    return run.info.status == "FINISHED" or run.data.tags.get("promotion") == "champion"


def record_of(made: MadeUp, stages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All that must be equal in two soaks of the same stages.

    Args:
        stages: ids of the flow runs by the name of the stage.
    """
    record: dict[str, Any] = {"registry": _registry(made)}
    for stage, flow_runs in stages.items():
        runs = [run for run in runs_of(made, flow_runs) if counts(run)]
        record[stage] = {"runs that count": len(runs)}
        if runs:
            record[stage] |= _record(made, runs[-1])
    return record


def _record(made: MadeUp, run: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        there = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=folder))
        journal = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
        nightly = {path.name: np.load(path).tolist() for path in sorted(there.glob("nightly/*.npy"))}
        root = str(made.home.parent)  # of the embedded rows, in the table of files
        tables = {
            path.name: json.loads(path.read_text().replace(r"\/", "/").replace(root, ""))  # pandas writes a slash so
            for path in sorted(there.glob("tables/*.json"))
        }
    lines = [
        (line["step"], {k: v for k, v in line["metrics"].items() if not k.startswith(_NOT_COMPARED)})
        for line in journal
    ]
    return {
        "params": dict(sorted(run.data.params.items())),
        "tags": {name: run.data.tags.get(name) for name in _TAGS},
        "metrics": points_of(made, run),
        "journal": lines,
        "nightly": nightly,
        "tables": tables,
    }


def _registry(made: MadeUp) -> dict[str, Any]:
    """Aliases, and the sha256 of every file and the verdict of every version."""
    server = client(made.mlflow)
    versions = {}
    for version in server.search_model_versions(f"name = '{MODEL}'"):
        with tempfile.TemporaryDirectory() as folder:
            uri = f"models:/{MODEL}/{version.version}"
            there = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
            files = hash_version(there)
        facts = {name: version.tags.get(name) for name in ("reason", "interval", "previous_champion")}
        versions[str(version.version)] = {
            "sha256": files,
            "as registered": json.loads(file_hashes(server, version) or "null"),
            **facts,
        }
    return {"versions": versions, "aliases": dict(server.get_registered_model(MODEL).aliases)}


def differences(expected: Any, found: Any, at: str = "") -> Iterator[str]:
    """A line for each place where two records differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            if key not in expected or key not in found:
                yield f"{at}/{key}: {'missing' if key in expected else 'not in the undisturbed record'}"
            else:
                yield from differences(expected[key], found[key], f"{at}/{key}")
    elif expected != found:
        yield f"{at}: {str(found)[:200]}, undisturbed {str(expected)[:200]}"


def faults_of_attempts(made: MadeUp, stages: Mapping[str, Sequence[str]], record: Mapping[str, Any]) -> Iterator[str]:
    """Faults in the runs of all attempts, interrupted ones too: double points, gaps, values that are not those of
    the undisturbed run.

    Args:
        record: of the undisturbed soak.
    """
    for stage, flow_runs in stages.items():
        for run in runs_of(made, flow_runs):
            name = f"{stage}: MLflow run {run.info.run_name} ({run.info.status})"
            if run.info.status == "RUNNING":
                yield f"{name} is left RUNNING"
            points = points_of(made, run)
            for metric, found in points.items():
                twice = [step for step, number in Counter(step for step, _ in found).items() if number > 1]
                if twice:
                    yield f"{name} has {metric} twice at steps {twice[:5]}"
                if wrong := [point for point in found if point not in record[stage]["metrics"].get(metric, [])]:
                    yield f"{name} has other values of {metric}: {wrong[:3]}"
            steps = [step for step, _ in points.get("train/loss", [])]
            if steps != list(range(1, len(steps) + 1)):
                yield f"{name} has a gap in train/loss: {len(steps)} points up to step {max(steps)}"


def left_running(made: MadeUp, locks: Sequence[Path]) -> list[str]:
    """Flow runs without an end, and locks that are held."""
    found = []
    for run in made.api("/flow_runs/filter", {"limit": 200}):
        state = run["state"] or {"type": "none", "name": "none"}
        planned = state["type"] == "SCHEDULED" and run["auto_scheduled"]
        if state["type"] not in _ENDED and not planned:
            found.append(f"the flow run {run['name']} is left {state['name']}: {state.get('message')}")
    for directory in locks:
        found += [f"{lock.what} is left held by {lock.describe()}" for lock in read_locks(directory) if lock.held]
    return found
