"""The commands that README and quickstart show, and a shell that runs them in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from made_up import BIN, FOREIGN, ROOT

NOT_RUN, SERVERS = "not run: ", "servers"
LANGUAGES = {"sh", "python", "text"}
# What a command that trains gets in addition, so that a test takes seconds.
SHORT = "max_steps=3 eval_rows=40 score_rows=40 sample_rows=2 pass_rows=10 max_new_tokens=4"
_BLOCK = re.compile(
    r"^(?:<!-- (?P<remark>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the name of the page.
        line: of the fence.
        language: behind the fence.
        text: what stands in the block.
        remark: the comment above it: "not run: REASON", "servers" with what to add, or nothing.
    """

    page: str
    line: int
    language: str
    text: str
    remark: str

    @property
    def commands(self) -> list[str]:
        """One a line, without the comments behind them; Python is one command."""
        if self.language == "python":
            return [f"python - <<'PYTHON'\n{self.text}PYTHON"]
        lines = [re.sub(r"\s{2,}# .*$", "", line) for line in self.text.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from its beginning."""
    text = page.read_text()
    return [
        Block(page.name, text.count("\n", 0, each.start()) + 1, each["language"], each["text"], each["remark"] or "")
        for each in _BLOCK.finditer(text)
    ]


def shortened(command: str) -> str:
    """A command that trains, with the parameters that make it short; any other command as it is."""
    if command == "make run":
        return f'make run ARGS="{SHORT}"'
    if command.startswith("finetune run ") and "--dry-run" not in command:
        return f"{command} {SHORT}"
    if command.startswith("prefect deployment run "):
        return " ".join([command, *(f"-p {each}" for each in SHORT.split())])
    return command


def copy_checkout(folder: Path) -> Path:
    """A copy of the checkout, whose ``.venv`` is the environment of this interpreter. Returns its path."""
    left_out = ("*.egg-info", "build", "dist", "site", "__pycache__", "tests", "docs", "results", ".*")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    (folder / ".venv").symlink_to(BIN.parent)
    shims = folder / ".shims"  # come last: what is installed is found first
    shims.mkdir()
    make = f'exec {shutil.which("make")} -o .venv/.installed BIN={shlex.quote(str(BIN))} "$@"\n'
    for name, text in {"make": make, "finetune": f'exec {shlex.quote(sys.executable)} -m flows "$@"\n'}.items():
        (shims / name).write_text(f"#!/bin/sh\n{text}")
        (shims / name).chmod(0o755)
    return folder


def run_commands(checkout: Path, commands: Sequence[str], seconds: float, **settings: str) -> tuple[list[str], str]:
    """Run commands in one shell until one fails; ``make up`` in the background, until it says that it is ready.

    Returns:
        The commands that ended with status 0, and all output.
    """
    done, shims = checkout / "done.txt", checkout / ".shims"
    script = ["set -e -o pipefail"]
    for number, command in enumerate(commands):
        if command == "make up":
            command = "touch up.log; make up > up.log 2>&1 &\nuntil grep -q 'deployment run' up.log; do\n"
            command += "    kill -0 $! || { cat up.log; exit 1; }\n    sleep 1\ndone"
        script += [f"echo {shlex.quote('$ ' + command)}", command, f"echo {number} >> {done}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith((*FOREIGN, "PYTHON"))}
    environment |= {
        "PATH": f"{shims}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "HOME": str(checkout / "home"),
        "FINETUNE_LOCKS": str(checkout / "locks"),
        **settings,
    }
    for name in ("home", "locks"):
        (checkout / name).mkdir(exist_ok=True)
    with (checkout / "output.txt").open("wb") as stream:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=checkout, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
    numbers = done.read_text().split() if done.exists() else []
    return [commands[int(number)] for number in numbers], (checkout / "output.txt").read_text(errors="replace")
