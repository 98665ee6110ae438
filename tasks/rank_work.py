"""What a rank of a gang does: its part of a training, or of the evaluation."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model.engine.ranks import Ranks, join_ranks
from model.engine.trainer import StepReport, TrainingStoppedError
from model.engine.training import train as run_training
from model.net.device import resolve_device, resolve_precision
from ops.machine.member import Member
from ops.settings import Settings
from tasks.frozen import load_frozen, trunk_cache
from tasks.gang_job import GangJob
from tasks.progress_lines import ProgressLines
from tasks.scoring import Scoring, score_models, write_outputs

TIMEOUT_VARIABLE = "FINETUNE_GANG_TIMEOUT"  # seconds that a rank waits for the others, in a step or at the start
_TIMEOUT_SECONDS = 600.0  # other ranks may load, capture graphs and write checkpoints meanwhile


def train_rank(job: GangJob, member: Member) -> None:
    """Train on this rank; the first rank tells the host steps, warnings and the result."""
    training = job.training
    config = replace(training.config, micro_batch_tokens=job.micro_batch_tokens or training.config.micro_batch_tokens)
    with _joined(job, member) as ranks:
        place = ranks.device
        network = load_frozen(training.model, training.plan, place, resolve_precision(config.precision, place))
        try:
            result = run_training(
                network,
                Path(training.tokens.directory),
                config,
                Path(training.directory),
                training.identity,
                on_step=_step_listener(member, ranks),
                warn=lambda text: member.send("warning", text=text),
                cache=trunk_cache(job.trunk_cache_gb),
                should_stop=member.stopping.is_set,
                ranks=ranks,
            )
        except TrainingStoppedError as error:  # on all ranks
            if ranks.leads:
                member.send("stopped", text=str(error))
            return
        if ranks.leads:
            member.send("result", value={**asdict(result), "best": str(result.best)})


def score_rank(job: GangJob, scoring: Scoring, member: Member) -> None:
    """Score test rows on this rank; the first rank writes what all of them found beside the checkpoints."""
    with _joined(job, member) as ranks:
        outputs = score_models(scoring, ranks.device, trunk_cache(job.trunk_cache_gb), ranks)
        if ranks.leads:
            path = Path(job.training.directory) / "outputs.json"
            write_outputs(path, outputs)
            member.send("outputs", path=str(path))


@contextmanager
def _joined(job: GangJob, member: Member) -> Iterator[Ranks]:
    Settings.load().claim_caches()
    place = rank_device(member, job.training.determinants["device"])
    with join_ranks(place, float(os.environ.get(TIMEOUT_VARIABLE) or _TIMEOUT_SECONDS)) as ranks:
        yield ranks


def rank_device(member: Member, kind: str) -> torch.device:
    """The device that the host gives this rank; without a host that of its local rank.

    Args:
        kind: cpu or cuda.

    Raises:
        ValueError: torch does not see that device.
    """
    by_hand = f"cuda:{member.local_rank}" if kind == "cuda" else kind
    return resolve_device(member.device or by_hand)


def _step_listener(member: Member, ranks: Ranks) -> Callable[[StepReport], None]:
    """Tells the host each step; without a host the lines of a run's log are printed."""
    if member.connection is not None:
        return lambda report: member.send("step", **asdict(report))
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    return ProgressLines(logging.getLogger(f"rank {ranks.rank}")).show
