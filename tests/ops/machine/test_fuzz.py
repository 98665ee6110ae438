"""Fuzzing of what processes write about themselves: a damaged text names no process, and never another one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fuzzing import PLACES, hypothesis, limits, mutated_json, put, settings, st

from ops.machine.lock_file import read_locks
from ops.machine.process import ProcessIdentity, identify_process

HERE = asdict(identify_process())
LOCK = {"what": "cpu", "holder": "a run", "since": "now", "flow_run_id": "x", "process": json.dumps(HERE)}


@settings(few=60)
@hypothesis.given(content=mutated_json(HERE))
def test_any_identity_is_a_process_or_none(content: bytes) -> None:
    """What is alive is this process."""
    found = ProcessIdentity.from_json(content.decode(errors="replace"))
    if found and found.is_alive:
        assert (found.pid, found.started) == (os.getpid(), HERE["started"])
    assert not (found and found.is_alive and found.is_dead)


@settings(few=60)
@hypothesis.given(data=st.data())
def test_any_lock_file_is_described(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Nobody holds it, whatever stands in it."""
    folder: Path = tmp_path_factory.getbasetemp() / "locks" / "here"
    folder.mkdir(parents=True, exist_ok=True)
    identity = data.draw(mutated_json(HERE)).decode(errors="replace")
    put(folder / "cpu.lock", data.draw(mutated_json({**LOCK, "process": identity})), data.draw(PLACES))
    with limits(folder):
        found = read_locks(folder)
    for state in found:
        assert not state.held
        assert len(state.describe()) < 10_000
