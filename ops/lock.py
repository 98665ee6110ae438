"""One at a time on a device or a training: lock files that the kernel frees the instant their holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(
    directory: Path, what: str, holder: str, log: Callable[[str], None], remind_seconds: float = 60
) -> Iterator[None]:
    """Hold something exclusively; wait for whoever holds it, and say for whom.

    Args:
        directory: where the lock files lie.
        what: a device by torch's name, such as "cuda:0", or a training.
        holder: shown to those who wait.
        log: told when waiting begins, and again every ``remind_seconds``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{what.replace(':', '-').replace(' ', '-')}.lock"
    with path.open("a+") as stream:
        reminded = 0.0
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not reminded or time.monotonic() - reminded > remind_seconds:
                    log(f"waiting for {what}, held by {_describe(path)} ({path})")
                    reminded = time.monotonic()
                time.sleep(0.5)
        if reminded:
            log(f"{what} is free: going on")
        stream.seek(0)
        stream.truncate()
        json.dump({"pid": os.getpid(), "holder": holder, "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, stream)
        stream.flush()
        try:
            yield
        finally:
            stream.seek(0)
            stream.truncate()
            stream.flush()
            fcntl.flock(stream, fcntl.LOCK_UN)


def _describe(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"{held['holder']} (pid {held['pid']}, since {held['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
