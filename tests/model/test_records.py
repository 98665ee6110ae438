"""Records that are read back: of their type, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.records import check_record, parse_record, read_record


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        b'{"a": 1}',
        b'{"a": "b"',
        b'{"a": ["b"]}',
        b'{"a": "1", "a": "2"}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_of_the_type_is_refused(tmp_path: Path, content: bytes) -> None:
    """The message names the file."""
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json is damaged: "):
        read_record(path, dict[str, str])


def test_a_record_comes_back_as_it_was() -> None:
    """Nothing is converted, added or left out."""
    assert parse_record('{"a": "1"}', dict[str, str], "x") == {"a": "1"}
    with pytest.raises(ValueError, match="x is damaged: a: "):
        parse_record('{"a": 1.0}', dict[str, int], "x")


def test_a_folder_is_no_record(tmp_path: Path) -> None:
    """The message names it; what is not there is a FileNotFoundError."""
    with pytest.raises(ValueError, match="is damaged: not a file"):
        read_record(tmp_path, dict[str, str])
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "absent", dict[str, str])


def test_a_value_is_checked_like_a_file() -> None:
    """Nothing is converted."""
    assert check_record({"a": 1}, dict[str, int], "x") == {"a": 1}
    with pytest.raises(ValueError, match="x is damaged: a: "):
        check_record({"a": "1"}, dict[str, int], "x")
