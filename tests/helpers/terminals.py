"""A process at a pseudo-terminal, and what it wrote as a page that a browser shows like a terminal."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import termios
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 100  # of the terminal; a page of them is 1280 pixels wide
_CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)")
# Nothing is loaded from elsewhere. A character is 0.602 em wide, so that 100 of them and the padding are 1280 pixels.
_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>terminal</title>
<style>
{stylesheet}
body {{ margin: 0; background: {background}; color: {foreground}; }}
pre {{ margin: 0; padding: 30px 36px; box-sizing: border-box; width: 1280px; font: 20px/24px "DejaVu Sans Mono",
monospace; white-space: pre-wrap; word-break: break-all; }}
</style>
<pre>{code}</pre>
"""


@dataclass(frozen=True)
class Written:
    """What a process did at a terminal.

    Attributes:
        status: its exit status.
        text: what it wrote, escape sequences included.
        first: seconds to the first of it.
    """

    status: int
    text: str
    first: float


def run_at_terminal(words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Written:
    """Run a process at a pseudo-terminal to its end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    began, first, output = time.monotonic(), math.nan, b""
    process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the process has closed its end
            break
        first = time.monotonic() - began if math.isnan(first) else first
        output += chunk
    os.close(ours)
    return Written(process.wait(60), output.decode(), first)


def plain(text: str) -> str:
    """A text without its escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def screen(text: str) -> list[str]:
    """The lines that stand on a terminal after a text, with the sequences of their colours.

    It follows what rich's live displays use: a line is written again after it was erased as a whole.
    """
    lines, row = [""], 0
    for part in _CONTROL.split(text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = ""
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part.endswith("m") or not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines


def as_page(lines: Iterable[str]) -> str:
    """Lines of a terminal as an HTML page, 1280 pixels wide."""
    console = Console(record=True, width=10_000, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)
    return console.export_html(theme=MONOKAI, code_format=_PAGE, inline_styles=True)
