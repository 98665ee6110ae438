"""Options read by argparse: each mistake is one sentence."""

from __future__ import annotations

import os
from importlib import import_module

import pytest

from flows.command_line import MODULES

WRONG = [
    ("sample", ["--modle", "x", "hi"], "there is no option --modle: did you mean --model?"),
    ("sample", ["--zzz=1", "hi"], "there is no option --zzz: `finetune sample --help` lists them"),
    ("sample", ["Write", "a function"], "a function is one word too many: text with spaces needs quotes; "),
    ("sample", ["--seed", "x\ny"], "finetune sample: argument --seed: invalid int value: 'x\\ny'; `finetune sample"),
    (
        "compare",
        ["models:/a/1"],
        "finetune compare: the following arguments are required: B; `finetune compare --help`",
    ),
    ("compare", ["a", "b", "c"], "c is one word too many: "),
    (
        "export",
        [],
        "finetune export: the following arguments are required: MODEL; `finetune export --help` shows its",
    ),
    ("export", ["a"], "finetune export: say where to: --directory DIR, --push USER/NAME or --gguf FILE; "),
    ("export", ["a", "--dtype", "f99"], "finetune export: argument --dtype: invalid choice: 'f99' (choose from "),
    ("report", ["--html"], "finetune report: argument --html: expected one argument; `finetune report --help` shows"),
    ("rollback", [], "finetune rollback: the following arguments are required: SIZE; "),
    ("doctor", ["--fixx"], "there is no option --fixx: did you mean --fix?"),
    ("doctor", ["\x1b[2J"], "\\x1b[2J is one word too many"),
    ("nightly", ["maybe"], "finetune nightly: argument state: invalid choice: 'maybe' (choose from "),
    ("bench", ["--foo"], "there is no option --foo: `finetune bench --help` lists them"),
]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark sets variables for its children before it reads its options: other tests must not see them."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize(("command", "words", "said"), WRONG)
def test_a_wrong_option_is_one_sentence(
    command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which says what is wrong, and where help is; exit status 2."""
    with pytest.raises(SystemExit) as ended:
        import_module(MODULES[command][0]).main(words)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(said)
    assert "did you mean" in line or f"`finetune {command} --help`" in line


def test_every_command_is_tried() -> None:
    assert {command for command, _, _ in WRONG} == set(MODULES)


@pytest.mark.parametrize("command", MODULES)
def test_help_has_no_markup(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the command, as it is typed."""
    with pytest.raises(SystemExit) as ended:
        import_module(MODULES[command][0]).main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: finetune {command} ")
    assert "``" not in text
