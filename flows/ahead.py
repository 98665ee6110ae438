"""The helpers of a sweep are started when its command line has been read: before torch and Prefect are imported.

Nothing here imports torch, Prefect or MLflow: the helpers import while this process does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from flows.arguments import Request
from flows.job import refused_values, unknown_parameters
from flows.local import RUN
from flows.trials import SweepJob, refused_grid
from ops.machine.process import identify_process
from ops.servers import count_gpus
from ops.threads import in_daemon_thread
from tasks.trial_helpers import dismiss_helpers, dismissals, start_helpers


@contextmanager
def helpers_ahead(request: Request) -> Iterator[None]:
    """Have the helpers of a sweep wait during the body, if it may use more than one GPU; none of another flow."""
    most = _most_helpers(request)
    if most == 0:
        yield
        return
    # As flows.local does later: a helper of a flow run that is killed is found, and ended, by the next.
    os.environ[RUN] = identify_process().to_json()
    since = dismissals()
    # In a thread, as listing the GPUs may take seconds.
    in_daemon_thread(lambda: start_helpers(min(most, count_gpus() - 1), since), "start-helpers")
    try:
        yield
    finally:
        dismiss_helpers()


def _most_helpers(request: Request) -> int:
    """How many helpers a flow run can use at most, on a machine with any number of GPUs."""
    values = request.parameters
    if request.flow != "sweep" or values.get("device", "auto") not in ("auto", "cuda"):
        return 0
    # What is wrong is told by the check that follows; it imports torch.
    if unknown_parameters(values, SweepJob) or refused_values(values, SweepJob) or refused_grid(values):
        return 0
    return math.prod(len(tried) for tried in values["grid"].values()) - 1
