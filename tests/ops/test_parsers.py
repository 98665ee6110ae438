"""Options of the commands are read before the commands are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ops.parsers import PARSERS

ROOT = Path(__file__).resolve().parents[2]
_SLOW = ("torch", "mlflow", "prefect", "numpy")
_LOOK = f"""
import atexit, sys
atexit.register(lambda: print(*[name for name in {_SLOW} if name in sys.modules]))
from flows.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", PARSERS)
def test_a_wrong_option_is_answered_at_once(command: str) -> None:
    """Nothing that takes seconds is imported for it."""
    words = [sys.executable, "-c", _LOOK, command, "--nosuch"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == "\n"
    assert f"finetune {command}" in done.stderr or "--nosuch" in done.stderr
    assert done.stderr.count("\n") == 1
