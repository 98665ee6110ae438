"""README, quickstart and the pages: what they show can be typed, and what they link to exists."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from made_up import free_ports
from pages import LANGUAGES, NOT_RUN, SERVERS, Block, copy_checkout, read_blocks, run_commands, shortened

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "quickstart.md", ROOT / "README.md")
PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def _commands(servers: bool) -> list[str]:
    """What is run, each command once: the quickstart's commands, then those that the README alone shows.

    Args:
        servers: those of the blocks that need servers, in place of the others.
    """
    found: dict[str, None] = {}
    for page in PAGES:
        for block in read_blocks(page):
            if block.language == "text" or block.remark.startswith(NOT_RUN):
                continue
            if block.remark.startswith(SERVERS) is servers:
                found |= dict.fromkeys(block.commands)
    return [shortened(command) for command in found]


def _check(commands: list[str], done: list[str], output: str) -> None:
    assert done == commands, f"{commands[len(done)]} failed:\n{output[-4000:]}"


@pytest.mark.slow
def test_commands_that_need_no_servers(tmp_path: Path) -> None:
    """Each command of README and quickstart ends well, in a copy of the checkout; trainings are short."""
    commands = _commands(servers=False)
    assert len(commands) >= 9
    checkout = copy_checkout(tmp_path / "clone")
    _check(commands, *run_commands(checkout, commands, 1200))
    assert (checkout / "tuned" / "config.json").exists()
    assert (checkout / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_commands_with_servers(tmp_path: Path) -> None:
    """Those with ``make up``: deployments, a sweep and a night end well, and ``make down`` ends everything."""
    commands = _commands(servers=True)
    assert len(commands) >= 9
    assert {"make up", "make down"} <= set(commands)
    checkout = copy_checkout(tmp_path / "clone")
    prefect, mlflow = map(str, free_ports(2))
    try:
        done, output = run_commands(
            checkout, commands, 3000, FINETUNE_PREFECT_PORT=prefect, FINETUNE_MLFLOW_PORT=mlflow, FINETUNE_GPUS="1"
        )
    finally:
        down = [str(checkout / ".shims" / "make"), "down"]
        subprocess.run(down, cwd=checkout, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(checkout)}, timeout=120)
    _check(commands, done, output)
    assert output.count("Completed") >= 3


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{block.page}:{block.line}" for block in BLOCKS])
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    """A block has a language, and the comment above it a reason."""
    assert block.language in LANGUAGES
    if block.language == "text":
        return
    assert block.remark in ("", SERVERS) or block.remark.startswith((f"{SERVERS}: ", NOT_RUN)), block.remark
    assert not block.remark.startswith(NOT_RUN) or len(block.remark) > len(NOT_RUN) + 10
    assert block.commands
    assert not [command for command in block.commands if command.endswith("\\")], "one command a line"


def test_ci_runs_what_only_ci_runs() -> None:
    """The README's first two commands are those of .ci/run, which also builds the pages."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    first = next(block for block in read_blocks(ROOT / "README.md") if block.language == "sh")
    assert first.commands == ["make run", "make test"]
    assert {*first.commands, "make docs"} <= set(lines)


def test_the_readme_is_short() -> None:
    """It fits into a reader's patience; all else stands in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_to_something(paper: str) -> None:
    """Files and headings that a paper outside docs/ links to; ``make docs`` checks those inside."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / paper).read_text())
    for link in links:
        if "://" in link:
            assert re.fullmatch(r"https?://[\w.-]+\.\w+(/\S*)?", link), link
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in _anchors(ROOT / path), link


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The script .ci/docs.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        "<script async src='//cdn.example.org/x.js'></script>",
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<img alt="a" src="http://example.org/badge.svg">',
        "@font-face { src: url(https://example.org/font.woff2) }",
        '@import "https://example.org/a.css"',
        '<pre class="mermaid"><code>graph</code></pre>',
        '<a href="javascript:alert(1)">x</a>',
        '<a href="https:///path">x</a>',
    ],
)
def test_what_a_page_may_not_load(site: ModuleType, page: str) -> None:
    """Opening the site asks no other machine for anything."""
    assert site.findings(page)


def test_what_a_page_may_have(site: ModuleType) -> None:
    """Links, its own files and embedded pictures."""
    page = '<a href="https://mlflow.org">x</a><img src="images/a.svg"><link rel="icon" href="assets/a.png">'
    page += (
        '<link rel="canonical" href="https://example.org/"><style>a{background:url(data:image/png;base64,AA)}</style>'
    )
    assert site.findings(page) == []


def test_a_page_that_is_not_in_the_navigation_is_an_error(site: ModuleType, tmp_path: Path) -> None:
    """``make docs`` names it and builds nothing."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text("# New\n")
    (tmp_path / "zensical.toml").write_text("nav = []\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "ROOT", tmp_path)
        assert site.main() == 1


def test_the_citation_has_the_version() -> None:
    """CITATION.cff, pyproject.toml and the newest release agree."""
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
