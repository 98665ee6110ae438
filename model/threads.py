"""How the threads of a process share Python's global interpreter lock (GIL)."""

from __future__ import annotations

import sys

_SWITCH_SECONDS = 0.0005


def shorten_switch_interval() -> None:
    """Have a thread give the GIL up after 0.5 ms, in place of Python's 5, if another thread waits for it.

    Reading weights and launching kernels releases the GIL hundreds of times a second. While another thread runs
    Python code, such as an import or MLflow's client, getting it back takes one switch interval each time.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
