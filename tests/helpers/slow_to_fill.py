"""``-m slow_to_fill JOB``: a rank of a real training whose frozen blocks take a second longer for each chunk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from model.engine.engine import Engine
from tasks import rank_worker

trunk = Engine.trunk


def slow_trunk(self: Engine, batch: Any) -> Any:
    with Path(os.environ["CHUNKS"]).open("a") as stream:
        stream.write("a chunk\n")
    time.sleep(1)
    return trunk(self, batch)


Engine.trunk = slow_trunk  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(rank_worker.main(sys.argv[1:]))
