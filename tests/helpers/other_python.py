"""Interpreters of environments of their own, for packages that this project's environment does not have."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest


def python_with(module: str, variable: str) -> str:
    """The interpreter that a variable names, or this one if it has the module; skips the test where neither is.

    Such a test runs the other package in a subprocess, so that its requirements need not fit this project's.
    """
    if named := os.environ.get(variable):
        return named
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed here; {variable} may name the python of an environment that has it")
    return sys.executable
