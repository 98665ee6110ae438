"""Check the pinned versions for known vulnerabilities with pip-audit; part of ``make check``.

Findings explained in .ci/audit.toml are printed; others fail the check. Without access to the database of pip-audit
nothing can be checked: one line says so, and the check does not fail.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SECONDS = 300  # time limit of the whole audit
AWAY = "pip-audit: the database of vulnerabilities cannot be reached ({}): the pinned versions were not checked"


def main() -> int:
    """Run pip-audit over constraints.txt and print what it finds. Returns the exit status."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(HERE.parent / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(AWAY.format(f"no answer in {SECONDS} s"))
        return 0
    if "No module named pip_audit" in done.stderr:
        print("pip-audit is not installed: run make install", file=sys.stderr)
        return 1
    try:
        report = json.loads(done.stdout)
    except ValueError:  # pip-audit ended without a report
        ending = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if re.search("requests.exceptions|ConnectionError|ServiceError|Timeout", done.stderr):
            print(AWAY.format(ending.split(":")[0].rpartition(".")[2]))
            return 0
        print(f"pip-audit failed: {ending}", file=sys.stderr)
        return 1
    explained = tomllib.loads((HERE / "audit.toml").read_text()).get("explained", [])
    lines, failed = judge(report, explained)
    print("\n".join(lines))
    return int(failed)


def judge(report: dict[str, Any], explained: list[dict[str, str]]) -> tuple[list[str], bool]:
    """Lines about pip-audit's report, and whether a finding is not explained.

    Args:
        report: pip-audit's JSON.
        explained: entries of .ci/audit.toml with ``id``, ``package`` and ``reason``.
    """
    checked = [entry for entry in report["dependencies"] if "skip_reason" not in entry]
    if not checked:
        return [AWAY.format("it knows none of the packages")], False
    reasons = {(entry["package"], entry["id"]): entry["reason"] for entry in explained}
    lines, used, failed = [], set(), False
    for entry in checked:
        for finding in entry["vulns"]:
            names = {(entry["name"], name) for name in (finding["id"], *finding.get("aliases", ()))}
            known = names & reasons.keys()
            used |= known
            failed = failed or not known
            fixed = ", ".join(finding.get("fix_versions", ())) or "no version"
            said = reasons[known.pop()] if known else f"not explained in .ci/audit.toml; fixed in {fixed}"
            lines.append(f"{entry['name']} {entry['version']}: {finding['id']}: {said}")
    lines += [f"{package} {name} is explained in .ci/audit.toml and no longer found" for package, name in
              sorted(reasons.keys() - used)]  # fmt: skip
    skipped = len(report["dependencies"]) - len(checked)
    lines.append(f"pip-audit: {len(checked)} packages checked" + (f", {skipped} not known to it" if skipped else ""))
    return lines, failed


if __name__ == "__main__":
    sys.exit(main())
