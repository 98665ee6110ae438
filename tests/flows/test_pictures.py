"""What a terminal shows, as a page in a real browser; FINETUNE_SCREENSHOTS=docs/images takes the pictures of docs/.

The output is that of real processes at a pseudo-terminal. Only the folder of the checkout has another name in it.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, open_browser, save_picture
from made_up import BIN, FOREIGN
from pages import copy_checkout, shortened
from terminals import as_page, plain, run_at_terminal, screen

pytestmark = pytest.mark.slow
WIDTH = 1280
_SHOWN_FOLDER = "~/finetune"
_MISTAKES = ("finetune run epoch=1", "finetune run dataset=rows.jsonl", "finetune export --directry tuned")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page as wide as a terminal of 100 columns."""
    with open_browser() as browser:
        yield browser.new_page(viewport={"width": WIDTH, "height": 200})


@pytest.fixture(scope="module")
def checkout(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout. Depends on the browser, so that nothing is run without one."""
    return copy_checkout(tmp_path_factory.mktemp("clone") / "finetune")


def _typed(checkout: Path, command: str) -> tuple[int, str]:
    """Type a command at a terminal. Returns its exit status, and what stands there, the command included."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*FOREIGN, "PYTHON"))}
    kept |= {"PATH": f"{checkout / '.shims'}:{os.environ['PATH']}", "PYTHONPATH": str(checkout)}
    kept |= {"FINETUNE_LOCKS": str(checkout / "locks"), "TERM": "xterm-256color"}
    done = run_at_terminal(["bash", "-c", command], checkout, kept)
    text = done.text.replace(str(checkout), _SHOWN_FOLDER).replace(str(BIN.parent), f"{_SHOWN_FOLDER}/.venv")
    return done.status, f"$ {command}\n{text}"


def _show(page: Any, folder: Path, name: str, lines: list[str]) -> None:
    """Show lines of a terminal in the browser, check the page, and take its picture."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    file = folder / f"{name}.html"
    file.write_text(as_page(lines))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTH
    assert page.evaluate("document.querySelector('pre').getBoundingClientRect().width") == WIDTH
    assert page.inner_text("pre").rstrip() == "\n".join(plain(line) for line in lines).rstrip()
    assert asked == [file.as_uri()]
    save_picture(page, name, whole=True)


def _while_training(text: str) -> str:
    """The output until a bar of the last third of the training."""
    bars = [bar for bar in re.finditer(r"step (\d+)/(\d+) [^\r\n]* left[^\r\n]*", text) if int(bar[1]) < int(bar[2])]
    return text[: bars[len(bars) * 4 // 5].end()]


def test_a_run(page: Any, checkout: Path, tmp_path: Path) -> None:
    """During its training, with the bar, and its result: scores and samples."""
    command = "make run"
    status, text = _typed(checkout, command if SCREENSHOTS else shortened(command))
    assert status == 0, text[-3000:]
    training = screen(_while_training(text))
    assert re.search(r"step \d+/\d+ [━╸╺]+ loss \d\.\d{4} ", plain(training[-1]))
    assert any("│ rows   │ 3,426 train" in plain(line) for line in training)
    assert any("\x1b[" in line for line in training), "colours are kept"
    _show(page, tmp_path, "terminal-training", training)

    lines = screen(text)
    first, last = (lines.index(line) for line in lines if line.startswith(("held-out rows ", "time ")))
    result = lines[first:last]
    assert "  tuned:" in result
    _show(page, tmp_path, "terminal-result", result)


def test_help_and_mistakes(page: Any, checkout: Path, tmp_path: Path) -> None:
    """The list of commands, and some mistakes, each with its sentence."""
    status, text = _typed(checkout, "finetune --help")
    assert status == 0, text
    lines = screen(text)
    for command in _MISTAKES:
        status, text = _typed(checkout, command)
        assert status == 2, text
        asked, sentence, *rest = screen(text)
        assert (asked, [plain(each) for each in rest]) == (f"$ {shlex.join(shlex.split(command))}", [""])
        lines += [asked, sentence]
    _show(page, tmp_path, "terminal-help", lines)
