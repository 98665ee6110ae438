"""The metric of the task gpt2_code_rows, for lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def choices(doc: dict[str, Any]) -> list[str]:
    """The line break in front of the response, and with the response behind it."""
    return ["\n", f"\n{doc['completion']}<|endoftext|>"]


def response(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The log-likelihood of the response with its end-of-text token, in nats."""
    (line_break, _), (whole, _) = results
    return {"response_loglikelihood": whole - line_break}


def total(values: Sequence[float]) -> float:
    """Summed over the rows."""
    return math.fsum(values)
