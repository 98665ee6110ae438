"""Row 36 of the table of faults, the part of pip-audit: findings fail ``make check`` unless they are explained.

The database of vulnerabilities is not reachable everywhere, so pip-audit's reports are made here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FINDING = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": ""}
INSTALLED = importlib.util.find_spec("pip_audit") is not None


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    """The script .ci/audit.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _report(*findings: dict[str, Any]) -> dict[str, Any]:
    known = {"name": "jinja2", "version": "3.1", "vulns": list(findings)}
    return {"dependencies": [known, {"name": "torch", "skip_reason": "not on PyPI"}]}


def test_a_finding_fails(audit: ModuleType) -> None:
    lines, failed = audit.judge(_report(FINDING), [])
    assert failed
    assert lines[0] == "jinja2 3.1: PYSEC-1: not explained in .ci/audit.toml; fixed in 2.0"
    assert lines[-1] == "pip-audit: 1 packages checked, 1 not known to it"


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_explained_finding_does_not(name: str, audit: ModuleType) -> None:
    """By its id or an alias, of that package only; a second finding still fails."""
    explained = [{"id": name, "package": "jinja2", "reason": "templates are our own"}]
    lines, failed = audit.judge(_report(FINDING), explained)
    assert not failed
    assert lines[0] == "jinja2 3.1: PYSEC-1: templates are our own"
    assert audit.judge(_report(FINDING, {**FINDING, "id": "PYSEC-2", "aliases": []}), explained)[1]
    assert audit.judge(_report(FINDING), [{**explained[0], "package": "flask"}])[1]


def test_no_finding(audit: ModuleType) -> None:
    """An explanation that is no longer needed is named."""
    lines, failed = audit.judge(_report(), [{"id": "CVE-1", "package": "jinja2", "reason": "x"}])
    assert not failed
    assert lines[0] == "jinja2 CVE-1 is explained in .ci/audit.toml and no longer found"


def test_a_database_that_knows_nothing(audit: ModuleType) -> None:
    """A mirror of the package index has packages and no vulnerabilities: that is not a clean result."""
    (line,), failed = audit.judge({"dependencies": [{"name": "jinja2", "skip_reason": "not found"}]}, [])
    assert not failed
    assert "were not checked" in line


@pytest.mark.skipif(not INSTALLED, reason="pip-audit is not installed: make install")
def test_without_a_network_one_line_says_so() -> None:
    """The real pip-audit, behind a proxy that does not answer."""
    away = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")}
    environment = os.environ | away | {"NO_PROXY": "", "no_proxy": ""}
    command = [sys.executable, str(ROOT / ".ci" / "audit.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "were not checked" in line
    assert done.stderr == ""


def test_make_check_and_ci_run_it() -> None:
    assert "$(BIN)/python .ci/audit.py" in (ROOT / "Makefile").read_text()
    assert "make check" in (ROOT / ".ci" / "run").read_text()
