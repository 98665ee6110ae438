"""The journal of metrics: lines are appended and truncated, and half a line is never read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.engine.journal import MetricsJournal, read_journal


def steps(path: Path, start: int = 0) -> list[int]:
    return [record["step"] for record in read_journal(path, start)]


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    """A process killed after append has lost nothing."""
    journal = MetricsJournal(tmp_path / "new" / "metrics.jsonl")
    assert (steps(journal.path), journal.lines) == ([], 0)
    journal.append(1, {"train/loss": 0.1 + 0.2})
    [record] = read_journal(journal.path)
    assert record["metrics"] == {"train/loss": 0.1 + 0.2}  # every digit
    assert record["time"] > 1_500_000_000_000  # milliseconds
    journal.append(2, {})
    journal.append(2, {})
    assert (steps(journal.path), journal.lines) == ([1, 2, 2], 3)
    assert steps(journal.path, start=1) == [2, 2]


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    """Half a line, left by a killed process, is deleted before the next line is written."""
    journal = MetricsJournal(tmp_path / "metrics.jsonl")
    journal.append(1, {})
    with journal.path.open("a") as stream:
        stream.write('{"step": 2, "tim')
    assert steps(journal.path) == [1]
    again = MetricsJournal(journal.path)
    assert again.lines == 1
    again.append(3, {})
    assert steps(journal.path) == [1, 3]


def test_truncate_keeps_the_first_lines(tmp_path: Path) -> None:
    """Lines after the checkpoint are deleted; new lines follow without gap or duplicate."""
    journal = MetricsJournal(tmp_path / "metrics.jsonl")
    for step in range(5):
        journal.append(step, {"x": step})
    journal.truncate(3)
    journal.append(7, {})
    assert (steps(journal.path), journal.lines) == ([0, 1, 2, 7], 4)
    journal.truncate(99)
    assert journal.lines == 4
    journal.truncate(0)
    assert (journal.path.read_bytes(), journal.lines) == (b"", 0)


def test_absent_journal_is_empty(tmp_path: Path) -> None:
    """A journal that does not exist yet has no lines."""
    assert read_journal(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"{]",
        b"null",
        b'{"step": 1.5, "time": 1, "metrics": {}}',
        b'{"step": 1, "time": 1, "metricsme": 4, "metrics": {}}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    """By file and number; the journal can still be opened, counted and cut."""
    journal = MetricsJournal(tmp_path / "metrics.jsonl")
    journal.append(1, {"x": 1.0})
    with journal.path.open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is damaged"):
        read_journal(journal.path)
    again = MetricsJournal(journal.path)
    assert again.lines == 2
    again.truncate(1)
    assert steps(journal.path) == [1]


def test_a_carriage_return_is_no_end_of_a_line(tmp_path: Path) -> None:
    """A damaged byte does not move the cut."""
    journal = MetricsJournal(tmp_path / "metrics.jsonl")
    journal.path.write_bytes(b"a\rb\nc\n")
    journal.truncate(1)
    assert journal.path.read_bytes() == b"a\rb\n"


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_no_journal(tmp_path: Path, kind: str) -> None:
    """A pipe would be read for ever."""
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not a file: remove it"):
        MetricsJournal(path)
    if kind != "loop":
        with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read: not a file"):
            read_journal(path)


def test_a_line_that_says_something_twice_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 1, "metrics": {}, "step": 2}\n')
    with pytest.raises(ValueError, match=r"line 1 is damaged: it has the key 'step' twice"):
        read_journal(path)
