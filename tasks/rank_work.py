"""What a rank of a gang does: its part of a training."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model.engine.ranks import Ranks, join_ranks
from model.engine.trainer import StepReport, TrainingStoppedError
from model.engine.training import train as run_training
from model.engine.trunk import TrunkCacheConfig
from model.net.device import resolve_device, resolve_precision
from ops.machine.member import Member
from ops.settings import Settings
from tasks.frozen import load_frozen
from tasks.gang_job import GangJob
from tasks.progress import ProgressLines

TIMEOUT_VARIABLE = "FINETUNE_GANG_TIMEOUT"  # seconds that a rank waits for the others, in a step or at the start
_TIMEOUT_SECONDS = 600.0  # other ranks may load, capture graphs and write checkpoints meanwhile


def train_rank(job: GangJob, member: Member) -> None:
    """Train on this rank; the first rank tells the host steps, warnings and the result."""
    settings = Settings.load()
    settings.claim_caches()
    training = job.training
    place = rank_device(member, training.determinants["device"])
    with join_ranks(place, float(os.environ.get(TIMEOUT_VARIABLE) or _TIMEOUT_SECONDS)) as ranks:
        network = load_frozen(
            training.model, training.plan, place, resolve_precision(training.config.precision, place)
        )
        try:
            result = run_training(
                network,
                Path(training.tokens.directory),
                replace(
                    training.config, micro_batch_tokens=job.micro_batch_tokens or training.config.micro_batch_tokens
                ),
                Path(training.directory),
                training.identity,
                on_step=_step_listener(member, ranks),
                warn=lambda text: member.send("warning", text=text),
                cache=TrunkCacheConfig(settings.trunk_outputs, int(job.trunk_cache_gb * 1e9)),
                should_stop=member.stopping.is_set,
                ranks=ranks,
            )
        except TrainingStoppedError as error:
            if ranks.rank == 0:
                member.send("stopped", text=str(error))
            return
        if ranks.rank == 0:
            member.send("result", value={**asdict(result), "best": str(result.best)})


def rank_device(member: Member, kind: str) -> torch.device:
    """The device that the host gives this rank; without a host that of its local rank.

    Args:
        kind: cpu or cuda.

    Raises:
        ValueError: torch does not see that device.
    """
    by_hand = f"cuda:{member.local_rank}" if kind == "cuda" else kind
    place = resolve_device(member.device or by_hand)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return place


def _step_listener(member: Member, ranks: Ranks) -> Callable[[StepReport], None]:
    """Tells the host each step; without a host the lines of a run's log are printed."""
    if member.connection is not None:
        return lambda report: member.send("step", **asdict(report))
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    return ProgressLines(logging.getLogger(f"rank {ranks.rank}")).show
