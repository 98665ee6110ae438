"""Which code made a run: the commit and the installed packages."""

from __future__ import annotations

import contextlib
import os
import subprocess
from importlib.metadata import distributions

from ops.settings import PROJECT_ROOT


def git_sha() -> str | None:
    """The commit of the checkout this code runs from; outside one FINETUNE_COMMIT, which the build of an image sets.

    None if there is neither.
    """
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return os.environ.get("FINETUNE_COMMIT") or None


def installed_packages() -> str:
    """Every installed package with its version, one ``name==version`` a line."""
    # Each access to a distribution's metadata parses its file again.
    found = [dist.metadata for dist in distributions()]
    pins = {f"{metadata['Name']}=={metadata['Version']}" for metadata in found if metadata["Name"]}
    return "\n".join(sorted(pins, key=str.lower)) + "\n"
