"""A helper of a sweep: a process that trains trials on a further GPU.

``python -m ops.machine.standby tasks.trial_helper`` is such a process. It imports all that a trial needs before it is
told of the sweep. It touches no GPU until it has the GPU's lock, and takes none before it is told.
"""

from __future__ import annotations

import logging
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from model.engine.trainer import TrainingStoppedError
from ops.machine.lock import TURN, exclusive_if_free
from ops.machine.lock_file import shared_directory
from ops.settings import Settings
from ops.tracking.connection import import_store
from tasks.progress_lines import ProgressLines
from tasks.trial_records import read_outcome
from tasks.trial_worker import Order, TrialWorker, claimed, read_order

_POLL_SECONDS = 2.0  # between two looks for a free device

Settings.load().claim_caches()
import_store(Settings.load().tracking_uri)
if find_spec("triton"):
    import model.engine.attention_kernels
    import model.engine.pointwise_kernels  # noqa: F401


def work(order: str, closed: threading.Event) -> None:
    """Help with a sweep on any of the order's devices that is free, until no trial is left.

    Args:
        order: the file of the order.
        closed: asks to stop after the present step, with a checkpoint.
    """
    told = read_order(Path(order))
    # force: a library may have set up the root logger when it was imported, for warnings alone.
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log = logging.getLogger("sweep")
    settings = Settings.load()
    settings.claim_caches()
    directory = shared_directory(settings.device_locks)
    while _has_work(told, log) and not closed.is_set():
        with exclusive_if_free(directory, list(told.places), told.holder, told.flow_run_id, TURN) as held:
            if held is not None:
                device = told.places[held.what]
                log.info("helps on %s", device)
                try:
                    TrialWorker(told, device, ProgressLines(log), log, closed.is_set).work()
                except TrainingStoppedError as error:
                    log.info("%s", error)
                return
        closed.wait(_POLL_SECONDS)


def _has_work(order: Order, log: Any) -> bool:
    """Whether there is a trial that has not ended and that no process has."""
    for trial in order.sweep.trials:
        with claimed(trial) as is_free:
            if is_free and read_outcome(trial, order.run.run_id, log) is None:
                return True
    return False
