"""What the ranks of a gang are told: a JSON file of references, which a command can write too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from model.files import write_json
from model.records import read_record
from tasks.references import TrainingRef
from tasks.scoring import Scoring


@dataclass(frozen=True)
class GangJob:
    """The work of a gang: to train, or to score a trained model.

    Attributes:
        training: what is trained, or was.
        trunk_cache_gb: limit of the frozen blocks' outputs, for each process.
        micro_batch_tokens: tokens per pass, if other than the training's own: memory may not have held those.
        scoring: what to score; None to train.
    """

    training: TrainingRef
    trunk_cache_gb: float
    micro_batch_tokens: int | None = None
    scoring: Scoring | None = None


def write_job(path: Path, job: GangJob) -> None:
    """Write a job as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(job))


def read_job(path: Path) -> GangJob:
    """What ``write_job`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the message names it.
    """
    return read_record(path, GangJob)
