"""Atomic files and directories: complete or absent."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from model.files import atomic_directory, remove_strays, sha256_file, sha256_json, write_json


def test_sha256_file(tmp_path: Path) -> None:
    """The hash is over every byte, also of a file longer than a read buffer."""
    data = bytes(range(256)) * 4096
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_sha256_json_does_not_depend_on_key_order() -> None:
    """Equal values have equal hashes in any order of keys; any other value has another hash."""
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert len({sha256_json(v) for v in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": 1.5}, {"a": None}, {})}) == 6


def test_write_json_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be written leaves the old file unchanged."""
    path = tmp_path / "new" / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json(path, {"step": 2, "bad": object()})
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2}


def test_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    """The target does not exist before the block has succeeded."""
    target = tmp_path / "deep" / "target"
    with atomic_directory(target) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_failure_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    """After an error the old version is still there, and no scratch directory."""
    with atomic_directory(tmp_path / "target") as scratch:
        (scratch / "a").write_text("old")

    def fail() -> None:
        with atomic_directory(tmp_path / "target") as scratch:
            (scratch / "a").write_text("new")
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "a").read_text() == "old"


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """No file of the older version remains."""
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "target") as scratch:
            (scratch / name).touch()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["new"]


def test_strays_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """Scratch files and directories of a killed writer are removed, complete ones stay."""
    (tmp_path / ".step-00000004.0123.tmp" / "sub").mkdir(parents=True)
    (tmp_path / ".step-00000004.0123.tmp" / "sub" / "half").touch()
    (tmp_path / ".state.json.0123").touch()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    remove_strays(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000002"]
