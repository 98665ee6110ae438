"""Build the pages of docs/ into site/; part of ``make docs``.

zensical fails on a link to a page or heading that does not exist. This script also fails if a page of the site would
load anything from elsewhere when it is opened, or has an address that is none. It asks no other machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
# What a browser fetches by itself: scripts, pictures, style sheets and fonts, but not the targets of links.
LOADED = (
    re.compile(r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'> ]+"""),
    re.compile(r"""<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*?\bhref=["']?(?:https?:)?//[^"'> ]+"""),
    re.compile(r"""(?:url\(|@import )["']?(?:https?:)?//[^"')]+"""),
)
LINK = re.compile(r'<a\b[^>]*?\bhref="([a-z]+:[^"]*)"')
MERMAID = 'class="mermaid"'  # the theme would fetch its script


def findings(page: str) -> list[str]:
    """What a page of the site loads from elsewhere, and addresses in it that are none."""
    found = [f"loads {match[0]}" for pattern in LOADED for match in pattern.finditer(page)]
    found += ["has a mermaid diagram, whose script is loaded from elsewhere: use an SVG"] * (MERMAID in page)
    for address in LINK.findall(page):
        parts = urlsplit(address)
        if parts.scheme not in ("https", "http", "mailto") or (parts.scheme != "mailto" and not parts.hostname):
            found.append(f"links to {address}, which is no address")
    return found


def main() -> int:
    """Build the site and look at it. Returns the exit status."""
    nav = (ROOT / "zensical.toml").read_text()
    if missing := [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f'"{page.name}"' not in nav]:
        print(f"zensical.toml: nav lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    if subprocess.run(build, cwd=ROOT).returncode:
        print("the site was not built: the warnings are above", file=sys.stderr)
        return 1
    site = ROOT / "site"
    pages = sorted([*site.rglob("*.html"), *site.rglob("*.css")])
    wrong = [f"{page.relative_to(ROOT)} {each}" for page in pages for each in findings(page.read_text())]
    print(
        "\n".join(wrong) or f"{site / 'index.html'}: {len(pages)} files looked at, nothing is loaded from elsewhere"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
