"""``-m wrong_rank JOB``: a rank whose training raises a ValueError: of a library, or of this project."""

from __future__ import annotations

import os
import sys

from model.engine.trainer import Trainer
from model.net.device import resolve_precision
from tasks import rank_worker


def step_with_a_bug(self: Trainer, rows: object) -> None:
    int("a bug")


def step_with_a_mistake(self: Trainer, rows: object) -> None:
    resolve_precision("fp8", self.engine.device)


Trainer.step = step_with_a_bug if os.environ["WRONG_RANK"] == "bug" else step_with_a_mistake  # type: ignore

if __name__ == "__main__":
    sys.exit(rank_worker.main(sys.argv[1:]))
