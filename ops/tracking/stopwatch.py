"""Where the time of a run goes: seconds by step, with nothing left out between them."""

from __future__ import annotations

import time


class Laps:
    """A stop-watch that is read at the end of each step; the seconds of equal names add up."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, step: str) -> None:
        """All that was since the last reading was this step."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        self.last = now
