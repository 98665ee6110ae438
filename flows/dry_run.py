"""What a run would need."""

from __future__ import annotations

from flows.arguments import Request


def show_estimate(request: Request) -> None:
    """Print it."""
