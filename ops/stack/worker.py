"""``python -m ops.stack.worker``: a Prefect worker that lets its flow runs save a checkpoint before it ends.

``prefect worker start`` makes SIGTERM an interrupt of itself, and kills its flow runs on the way out
(PrefectHQ/prefect#22528). A scheduler that ends the task of a worker, or a container, kills what is left then: the
steps since the last checkpoint would be lost. This worker is Prefect's own, with another end: at SIGTERM or Ctrl-C it
takes no more runs, asks those that it has to end, and stays until Prefect knows how each of them ended.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from abc import ABC
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from ops.machine.process import ProcessIdentity, identify_process
from ops.recovery.limits import POOL
from ops.stack.up import SAVE_SECONDS

_HOOK_SECONDS = 15.0  # after SIGKILL, in which the hooks of a crashed run close its MLflow run
_POLL_SECONDS = 0.2
_SAME_SECONDS = 1.0  # signals within this time count as one: a scheduler may send them to task and processes


class Worker(ProcessWorker, ABC):  # ABC: Prefect then keeps its own class registered for the type "process"
    """Prefect's process worker, which can end after its flow runs.

    Attributes:
        processes: of its flow runs, by the flow run's id.
        stops: when it was asked to end, in seconds of the monotonic clock.
    """

    def __init__(self, limit: int | None = None, **options: Any):
        # With a limit Prefect counts the runs that are not over, their hooks included.
        super().__init__(limit=limit or sys.maxsize, **options)
        self.processes: dict[str, ProcessIdentity] = {}
        self.stops: list[float] = []

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Take runs that are due; none once it was asked to end."""
        return [] if self.stops else await super().get_and_submit_flow_runs()

    async def run(
        self, flow_run: FlowRun, configuration: ProcessJobConfiguration, task_status: Any = None
    ) -> ProcessWorkerResult:
        """Execute a flow run in a process of its own, and note which."""
        listener: Any = _Listener(self, str(flow_run.id), task_status)
        try:
            return await super().run(flow_run, configuration, listener)
        finally:
            self.processes.pop(str(flow_run.id), None)

    def ask(self) -> None:
        """Ask it to end; asked again later than a moment after, it kills its flow runs at once."""
        self.stops.append(time.monotonic())
        if len(self.stops) == 1:
            print("the worker takes no more runs", flush=True)

    async def serve(self, with_healthcheck: bool) -> None:
        """Take and execute flow runs until it is asked to end, and they have ended."""
        working = asyncio.create_task(self.start(with_healthcheck=with_healthcheck))
        while not working.done() and not self.stops:
            await asyncio.sleep(_POLL_SECONDS)
        if not working.done():
            await self._end_runs()
            working.cancel()  # as Prefect's own command ends it
        with suppress(asyncio.CancelledError):
            await working

    async def _end_runs(self) -> None:
        """Ask all flow runs to end (SIGTERM), kill those that do not (SIGKILL), and wait for their final states."""
        began = self.stops[0]
        sent: dict[ProcessIdentity, int] = {}
        if count := self._open_runs():
            print(f"ending {count} flow run(s), each after its checkpoint is saved", flush=True)
        while self._open_runs() and time.monotonic() < began + SAVE_SECONDS + _HOOK_SECONDS:
            in_a_hurry = self.stops[-1] > began + _SAME_SECONDS or time.monotonic() > began + SAVE_SECONDS
            number = signal.SIGKILL if in_a_hurry else signal.SIGTERM
            for process in list(self.processes.values()):
                if sent.get(process) != number and process.is_alive:
                    sent[process] = number
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)
            await asyncio.sleep(_POLL_SECONDS)

    def _open_runs(self) -> int:
        """Runs that it has taken and that are not over; 0 before it has reached Prefect's server."""
        try:
            return self.limiter.borrowed_tokens
        except RuntimeError:  # it has not begun
            return 0


class _Listener:
    """Hears the pid of a flow run's process, and passes it on to Prefect."""

    def __init__(self, worker: Worker, flow_run_id: str, task_status: Any):
        self._worker, self._flow_run_id, self._task_status = worker, flow_run_id, task_status

    def started(self, value: int) -> None:
        self._worker.processes[self._flow_run_id] = identify_process(value)
        if self._task_status is not None:
            self._task_status.started(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task_status, name)


async def _serve(name: str, limit: int | None, with_healthcheck: bool) -> None:
    settings = get_current_settings().worker
    worker = Worker(
        name=name,
        work_pool_name=POOL,
        limit=limit,
        prefetch_seconds=settings.prefetch_seconds,
        heartbeat_interval_seconds=int(settings.heartbeat_seconds),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.ask)
    await worker.serve(with_healthcheck)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker until SIGTERM or Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ops.stack.worker", description=__doc__)
    parser.add_argument("--name", default=os.uname().nodename, help="its name; by default that of the machine")
    parser.add_argument("--limit", type=int, help="flow runs at a time; by default as many as the work pool allows")
    parser.add_argument("--with-healthcheck", action="store_true", help="answer at /health while it polls")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit} is no number of flow runs: 1 is the lowest")
    if not os.environ.get("PREFECT_API_URL"):
        parser.error("PREFECT_API_URL must be set to the server's address, as client.env of make up does")
    asyncio.run(_serve(options.name, options.limit, options.with_healthcheck))
    return 0


if __name__ == "__main__":
    sys.exit(main())
