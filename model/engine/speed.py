"""The speed of a training over its last steps."""

from __future__ import annotations

import math
import time
from collections import deque


class Speed:
    """Tokens (without padding) and necessary operations per second over the last steps, without the validations.

    Args:
        window: steps that the averages cover.
    """

    def __init__(self, window: int = 20):
        self.steps: deque[tuple[int, float, float]] = deque(maxlen=window)  # tokens, operations, seconds
        self.restart()

    def restart(self) -> None:
        """Start timing the next step now."""
        self.since = time.perf_counter()

    def add(self, tokens: int, flops: float) -> None:
        """Count a step that ends now."""
        now = time.perf_counter()
        self.steps.append((tokens, flops, now - self.since))
        self.since = now

    @property
    def seconds_per_step(self) -> float:
        """NaN before the first step."""
        return sum(seconds for *_, seconds in self.steps) / len(self.steps) if self.steps else math.nan

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for tokens, *_ in self.steps) / sum(seconds for *_, seconds in self.steps)

    @property
    def flops_per_second(self) -> float:
        return sum(flops for _, flops, _ in self.steps) / sum(seconds for *_, seconds in self.steps)
