"""Atomic files and directories: complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from model.files import (
    atomic_directory,
    parse_json,
    path_of,
    read_bytes,
    remove_strays,
    save_tensors,
    sha256_file,
    sha256_json,
    shown,
    write_json,
)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_any_encoding_of_unicode(tmp_path: Path, encoding: str) -> None:
    """JSON's own encodings, with and without a byte order mark."""
    assert parse_json('{"name": "größe"}'.encode(encoding), tmp_path / "x.json") == {"name": "größe"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"name": "größe"}'.encode("latin-1"), "it is not UTF-8, save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html>", "an HTML page"),
        (b"", "an empty file"),
        (b"{", "Expecting property name"),
        (b"[" * 100_000, "recursion"),
        (b"1" * 5000, "4300 digits"),
        (b'{"n_layer": 2, "n_head": 2, "n_layer": 3}', "it has the key 'n_layer' twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "it has the key 'b' twice"),
    ],
)
def test_what_is_no_json_is_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    """No bare UnicodeDecodeError, RecursionError or position in a file without a name."""
    with pytest.raises(ValueError, match=rf"x\.json is not valid JSON: .*{reason}"):
        parse_json(content, tmp_path / "x.json")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_tensors_have_the_permissions_of_other_files(tmp_path: Path, umask: int) -> None:
    """safetensors#782: the library leaves 0600, and nobody else could load a model from a shared folder."""
    before = os.umask(umask)
    try:
        (tmp_path / "other").touch()
        save_tensors({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    """A pipe would be read for ever, and so would a device."""
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for read in (sha256_file, read_bytes):
        with pytest.raises(OSError, match=f"not a file: '{path}'"):
            read(path)


def test_values_are_shown_in_part() -> None:
    """A message has no more of a file's value than people read, however large or deep it is."""
    assert shown("n_layer") == "'n_layer'"
    assert len(shown("x" * 10_000)) <= 103
    bomb: list[object] = ["x"]
    for _ in range(40):
        bomb = [bomb] * 9  # its repr would have 9**40 letters
    assert len(shown(bomb)) <= 103
    assert shown(10**5000) == "a int"


@pytest.mark.parametrize("value", ["~nobody-has-this-name/x", "x" * 300, "a\0b", "loop/x"])
def test_a_parameter_that_can_be_no_path(tmp_path: Path, value: str) -> None:
    """One sentence, not RuntimeError or OSError."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"^weights_dir .* is not a path: "):
        path_of("weights_dir", value if value.startswith("~") else str(tmp_path / value))


def test_a_path_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, whether it exists or not."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("x", "~/link") == path_of("x", str(tmp_path / "link")) == tmp_path / "there"
    assert path_of("x", str(tmp_path / "absent")) == tmp_path / "absent"
