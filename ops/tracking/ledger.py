"""The ledger: which rows nights have trained on, and which rows come next.

The ledger consists of MLflow runs: those of nights that FINISHED, or whose version became champion. Their artifacts
hold the keys of the rows that the night used and saw. A night that failed leaves no entry, so the next night takes
its rows again. Deleting a run frees its rows.
"""

from __future__ import annotations

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from model.files import plain_name
from ops.redaction import redact, without_credentials
from ops.tracking.connection import client
from ops.tracking.registry import CHAMPION
from ops.tracking.runs import PROMOTION_TAG, RunRef, search_runs, set_tags

if TYPE_CHECKING:
    from mlflow.entities import Run

NIGHT_TAG = "nightly"  # of a night's run: the registered model it works for
_BEGUN_TAG = "nightly.begun"  # when the night chose its rows
_FOLDER, _USED, _SEEN = "nightly", "used.npy", "seen.npy"

Keys = np.ndarray[Any, Any]  # uint64, one for each row's content


@dataclass(frozen=True)
class Ledger:
    """What the successful nights of a model have recorded.

    Attributes:
        used: keys of all rows that a night was the first to train on, sorted.
        seen: keys of the rows of the data set at its last night, in the order in which they first appeared.
    """

    used: Keys
    seen: Keys


@dataclass(frozen=True)
class Choice:
    """The rows of a night.

    Attributes:
        fresh: keys of rows that no successful night has trained on.
        replay: keys of rows trained on before, repeated so that they are not forgotten.
        seen: keys of all rows of the data set, in the order in which they first appeared.
    """

    fresh: Keys
    replay: Keys
    seen: Keys

    @property
    def keys(self) -> Keys:
        """Keys of all rows to train on, sorted: the order depends on their contents only."""
        return np.sort(np.concatenate([self.fresh, self.replay]))

    @property
    def sha256(self) -> str:
        """A hash over the keys, which names the subset."""
        return _sha256(self.keys)


def _sha256(keys: Keys) -> str:
    return hashlib.sha256(keys.astype("<u8").tobytes()).hexdigest()


def no_keys() -> Keys:
    """An empty array of keys."""
    return np.empty(0, dtype=np.uint64)


def _nights(tracking_uri: str, model: str, dataset: str | None = None) -> list[Run]:
    """The successful nights of a registered model, oldest first; with ``dataset``, those on this data set.

    A night that was killed after its promotion counts: the next night starts from its model.
    """
    runs = search_runs(tracking_uri, f"tags.{NIGHT_TAG} = '{model}'", ["attributes.start_time ASC"])
    return [
        run
        for run in runs
        if (run.info.status == "FINISHED" or run.data.tags.get(PROMOTION_TAG) == CHAMPION)
        and (dataset is None or run.data.params.get("dataset") == dataset)
    ]


def caught_up(tracking_uri: str, model: str, dataset: str, scheduled: datetime) -> bool:
    """Whether a successful night on this data set began after the time at which this one was due."""
    nights = _nights(tracking_uri, model, dataset)
    begun = [run.data.tags[_BEGUN_TAG] for run in nights if _BEGUN_TAG in run.data.tags]
    return any(scheduled < datetime.fromisoformat(moment) for moment in begun)


def read_ledger(tracking_uri: str, model: str, dataset: str, copies: Path | None = None) -> Ledger:
    """Read what the nights of a registered model used, and what the last one on this data set saw.

    Args:
        copies: folder that caches the artifacts by run: a server takes 0.1 s for each night.

    Raises:
        RuntimeError: the artifacts of a night cannot be read; without them rows would be trained twice.
    """
    nights = _nights(tracking_uri, model)
    here = [run for run in nights if run.data.params.get("dataset") == dataset]
    with ThreadPoolExecutor(8) as pool:
        used = list(pool.map(lambda run: _read_used(tracking_uri, run.info.run_id, copies), nights))
    seen = _read(tracking_uri, here[-1].info.run_id, _SEEN) if here else no_keys()
    return Ledger(np.unique(np.concatenate([no_keys(), *used])), seen)


def _read_used(tracking_uri: str, run_id: str, copies: Path | None) -> Keys:
    """What a night used, from the cache where it is readable: the artifacts of a FINISHED run do not change."""
    if copies is None:
        return _read(tracking_uri, run_id, _USED)
    copy = copies / f"{plain_name(run_id, f'MLflow at {without_credentials(tracking_uri)}')}.npy"
    with suppress(OSError, ValueError, EOFError):
        return _load(copy)
    keys = _read(tracking_uri, run_id, _USED)
    copies.mkdir(parents=True, exist_ok=True)
    scratch = copies / f".{uuid.uuid4().hex}.npy"
    np.save(scratch, keys)
    scratch.replace(copy)
    return keys


def _read(tracking_uri: str, run_id: str, name: str) -> Keys:
    with TemporaryDirectory() as scratch:
        try:
            path = client(tracking_uri).download_artifacts(run_id, f"{_FOLDER}/{name}", scratch)
            return _load(Path(path))
        except Exception as error:  # MLflow, its HTTP client, the disk and numpy raise different ones
            raise RuntimeError(
                f"the ledger cannot be read: {_FOLDER}/{name} of the MLflow run {run_id} at "
                f"{without_credentials(tracking_uri)}: {redact(str(error))}. Restore that artifact, or delete "
                "the run in MLflow: its rows then count as not used"
            ) from error


def _load(path: Path) -> Keys:
    """Keys from a file.

    Raises:
        OSError, ValueError, EOFError: it cannot be read, or does not hold keys.
    """
    keys: Keys = np.load(path, allow_pickle=False)
    if keys.dtype != np.uint64 or keys.ndim != 1:
        raise ValueError(f"it holds {keys.dtype} of shape {keys.shape}, and no keys")
    return keys


def choose_rows(present: Keys, ledger: Ledger, count: int | None, replay_share: float, seed: int) -> Choice:
    """Choose the rows of a night by their content; their position in the file orders the new ones only.

    First come unused rows that were not in the data set at the last successful night, in the order of the source,
    then the backlog, in the order in which it appeared. Replayed rows are drawn from used rows that are still there.

    Args:
        present: keys of all rows that may train, in the order of the source, each once.
        count: fresh rows at most; None for all.
        replay_share: of all rows of the night, the share to draw from those used before.
        seed: of that draw, together with the fresh rows, so that a failed night is repeated with the same rows.
    """
    unused = present[~np.isin(present, ledger.used)]
    new = unused[~np.isin(unused, ledger.seen)]
    backlog = ledger.seen[np.isin(ledger.seen, unused)]
    fresh = np.concatenate([new, backlog])[:count]
    old = np.sort(present[np.isin(present, ledger.used)])
    wanted = round(len(fresh) * replay_share / (1 - replay_share))
    draw = np.random.default_rng([seed, int(_sha256(np.sort(fresh)), 16)])
    replay = draw.choice(old, min(wanted, len(old)), replace=False)
    still_there = ledger.seen[np.isin(ledger.seen, present)]
    return Choice(fresh, replay, np.concatenate([still_there, present[~np.isin(present, still_there)]]))


def record_night(run: RunRef, model: str, folder: Path, begun: datetime, tags: dict[str, str]) -> None:
    """Write a night into its MLflow run; it counts once the run is FINISHED, or its version champion.

    Args:
        model: the registered model.
        folder: as ``write_choice`` filled it.
        begun: when the night looked at the data.
        tags: further tags of the run.
    """
    mlflow = client(run.tracking_uri)
    for name in (_USED, _SEEN):
        mlflow.log_artifact(run.run_id, str(folder / name), _FOLDER)
    set_tags(run, {NIGHT_TAG: model, _BEGUN_TAG: begun.isoformat(), **tags})


def write_choice(choice: Choice, folder: Path) -> Path:
    """Write the files of a choice: two for the ledger, and the keys to train on.

    Returns:
        The file with the keys to train on.
    """
    np.save(folder / _USED, choice.fresh)
    np.save(folder / _SEEN, choice.seen)
    np.save(folder / "keys.npy", choice.keys)
    return folder / "keys.npy"
