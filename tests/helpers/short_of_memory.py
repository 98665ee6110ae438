"""``-m short_of_memory JOB``: a rank of a real training, of which the second lacks memory for long passes."""

from __future__ import annotations

import os
import sys

import torch

from model.engine.trainer import Trainer
from tasks import rank_worker

step = Trainer.step


def step_or_fail(self: Trainer, rows: object) -> None:
    if os.environ["RANK"] == "1" and self.state.step == 7 and self.micro_batch_tokens > 1024:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Injected by a test.")
    step(self, rows)  # type: ignore[arg-type]


Trainer.step = step_or_fail  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(rank_worker.main(sys.argv[1:]))
