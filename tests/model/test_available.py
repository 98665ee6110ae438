"""Processors and main memory that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.available import available_memory, available_processors


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_available_processors_heed_a_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], available: int
) -> None:
    """The quota is read for both cgroup versions, and rounded up. The machine has eight processors here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(8)}, raising=False)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_processors(tmp_path) == available


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8000 * 1024),
        ({"memory.max": "max", "memory.current": "900"}, 8000 * 1024),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 3\ninactive_file 50\n"}, 150),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400",
          "memory/memory.stat": "cache 90\ninactive_file 20\n"}, 620),
        ({"memory.max": "1000", "memory.current": "1900", "memory.stat": "inactive_file 0\n"}, 0),
    ],
)  # fmt: skip
def test_available_memory_heeds_a_containers_limit(tmp_path: Path, files: dict[str, str], available: int) -> None:
    """The limit is read for both cgroup versions; the page cache counts as available."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == available
