"""How the threads of a process share Python's interpreter."""

from __future__ import annotations

import sys

_TURN_SECONDS = 0.0005


def take_quick_turns() -> None:
    """Let a thread that waits for the interpreter have it after 0.5 ms, in place of Python's 5.

    Reading weights and launching kernels gives the interpreter up hundreds of times a second. While another thread
    runs Python code, such as an import or MLflow's client, each time costs a turn of that thread.
    """
    sys.setswitchinterval(_TURN_SECONDS)
