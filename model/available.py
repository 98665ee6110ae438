"""What this process may use of its machine, or of its container: processors and main memory."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("sys", "fs", "cgroup")


def available_processors(root: Path = Path("/")) -> int:
    """Processors that this process may use: those it may run on, or fewer if a container has a lower quota of time.

    Args:
        root: directory that contains ``sys``.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cgroups = root / _CGROUPS
    for files in ((cgroups / "cpu.max",), (cgroups / "cpu/cpu.cfs_quota_us", cgroups / "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max", which is no number, stands for no quota
            quota, period = (int(word) for file in files for word in file.read_text().split())
            if quota > 0:  # version 1 has -1 for none
                processors = min(processors, math.ceil(quota / period))
    return processors


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can be allocated now: the system's, or those of a container whose limit is lower.

    Args:
        root: directory that contains ``proc`` and ``sys``.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # free pages do not include the page cache, which can be reclaimed
        available = _field(root / "proc" / "meminfo", "MemAvailable:") * 1024
    cgroups = root / _CGROUPS
    for cgroup, limit, used in (  # versions 2 and 1
        (cgroups, "memory.max", "memory.current"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max", which is no number, stands for no limit
            free = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
            available = min(available, free + _field(cgroup / "memory.stat", "inactive_file"))
    return max(0, available)


def _field(file: Path, name: str) -> int:
    """The number that follows a name in a file of the kernel.

    Raises:
        OSError: the file or the name does not exist.
    """
    for words in map(str.split, file.read_text().splitlines()):
        if words[0] == name:
            return int(words[1])
    raise OSError(f"{file} has no line {name}")
