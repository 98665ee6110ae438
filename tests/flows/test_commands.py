"""The command that repeats a run."""

from __future__ import annotations

import shlex

from flows.arguments import parse
from flows.commands import repeat_command
from flows.job import Job, defaults


def test_the_command_has_the_same_parameters() -> None:
    """What differs from the deployment's own is named, whatever characters it has."""
    given = {
        **parse(["tiny"]).parameters,
        "max_steps": 7,
        "dataset": 'it\'s a "file".jsonl',
        "learning_rate": 0.0005,
        "top_k": None,
    }
    values = Job.from_parameters(given).flat()
    words = shlex.split(repeat_command(None, values, defaults()))
    assert words[:4] == ["python", "-m", "flows", "run"]
    assert Job.from_parameters(parse(words[4:]).parameters).flat() == values
    words = shlex.split(repeat_command("355m", values, defaults()))
    assert words[:4] == ["prefect", "deployment", "run", "finetune/355m"]
    changes = [word for word in words[4:] if word != "-p"]
    assert Job.from_parameters(parse(["355m", *changes]).parameters).flat() == values
    same = {**defaults(), **parse(["355m"]).parameters}
    assert repeat_command("355m", same, defaults()).endswith("run finetune/355m")
    assert repeat_command("by hand", defaults(), defaults()).endswith("run 'finetune/by hand'")
