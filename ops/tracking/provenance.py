"""Which code made a run, and which database: the commit, the installed packages, and MLflow's schemas."""

from __future__ import annotations

import subprocess
from importlib.metadata import distributions
from pathlib import Path

from ops.settings import PROJECT_ROOT


def git_sha() -> str | None:
    """The commit of the checkout this code runs from; None outside one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installed_packages() -> str:
    """Every installed package with its version, one ``name==version`` a line."""
    # Each access to a distribution's metadata parses its file again.
    found = [dist.metadata for dist in distributions()]
    pins = {f"{metadata['Name']}=={metadata['Version']}" for metadata in found if metadata["Name"]}
    return "\n".join(sorted(pins, key=str.lower)) + "\n"


def is_known_schema(revision: str) -> bool:
    """Whether the installed MLflow knows a schema of its database, which is then an older one."""
    import mlflow

    return any(Path(mlflow.__file__).parent.glob(f"store/db_migrations/versions/{revision}_*.py"))
