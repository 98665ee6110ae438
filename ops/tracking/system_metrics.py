"""The use of processor, memory, disk, network and GPU, logged to MLflow while a run is open.

MLflow's own monitor ends for good when its server does not answer once, and waits without a limit at the end of the
run. Here its sensors are read by a thread that survives both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

from ops.threads import in_daemon_thread
from ops.tracking.runs import RunRef, log_metrics

SECONDS = 10.0  # between two samples
_CLOSING_SECONDS = 5.0  # for the last one; a server that does not answer is left to the daemon thread
_PREFIX = "system/"  # MLflow shows these metrics on a page of their own


@contextmanager
def system_metrics(run: RunRef, wanted: bool, log: Any, seconds: float = SECONDS) -> Iterator[None]:
    """Log samples while the body runs: the first ones at once, the last ones at its end.

    Nothing is raised, and the body never waits. Samples that MLflow does not take are left out.

    Args:
        wanted: else nothing is logged.
        log: a logger; told once if a sample was not taken.
    """
    if not wanted:
        yield
        return
    over = threading.Event()
    sampling = in_daemon_thread(lambda: _sample(run, over, seconds, log), "system-metrics")
    try:
        yield
    finally:
        over.set()
        wait([sampling], _CLOSING_SECONDS)


def _sample(run: RunRef, over: threading.Event, seconds: float, log: Any) -> None:
    sensors: list[Any] = []
    begun, told = time.time(), False
    step = 0
    while True:
        ending = over.is_set()
        try:
            sensors = sensors or _sensors(log)
            values = {f"{_PREFIX}{name}": value for sensor in sensors for name, value in _read(sensor).items()}
            log_metrics(run, values, step)
        except Exception as error:
            if not told:
                log.warning("system metrics are missing while MLflow or a sensor does not answer: %s", error)
            told = True
        if ending:
            return
        over.wait(seconds)
        step = max(step + 1, round((time.time() - begun) / seconds))


def _sensors(log: Any) -> list[Any]:
    """MLflow's sensors of this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    if gpu := _gpu_sensor(log):
        found.append(gpu)
    return found


def _gpu_sensor(log: Any) -> Any:
    """MLflow's sensor of NVIDIA's GPUs; None without a GPU, or without the library that reads it."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        return GPUMonitor()
    except Exception as error:  # its library has errors of its own
        log.warning("the GPU is not among the system metrics (%s): pip install -e '.[gpu]'", error)
        return None


def _read(sensor: Any) -> dict[str, float]:
    """A sample of a sensor, which starts anew afterwards."""
    sensor.collect_metrics()
    values = dict(sensor.aggregate_metrics())
    sensor.clear_metrics()
    return values
