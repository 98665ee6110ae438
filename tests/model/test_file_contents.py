"""What files are, by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.file_contents import describe_content
from model.files import save_tensors


def _torch_file(tmp_path: Path, zipped: bool) -> bytes:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "made", _use_new_zipfile_serialization=zipped)
    return (tmp_path / "made").read_bytes()


def _tar(tmp_path: Path) -> bytes:
    with tarfile.open(tmp_path / "made", "w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return (tmp_path / "made").read_bytes()


def _safetensors(tmp_path: Path) -> bytes:
    save_tensors({"weight": torch.zeros(2)}, tmp_path / "made")
    return (tmp_path / "made").read_bytes()


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "a Git LFS pointer, not the file itself: run `git lfs pull`": lambda _: (
        b"version https://git-lfs.github.com/spec/v1\n"
    ),
    "a git-annex pointer, not the file itself: run `git annex get`": lambda _: b"/annex/objects/SHA256E-s5--ab\n",
    "an HTML page, perhaps of a login": lambda _: b"\r\n <!DOCTYPE HTML>\n<title>Sign in</title>",
    "an XML page": lambda _: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a Python pickle, which is never read": lambda _: pickle.dumps({"a": 1}),
    "a Python pickle of the oldest protocol": lambda _: pickle.dumps({"a": 1}, protocol=0),
    "a PyTorch checkpoint with a pickle inside": lambda path: _torch_file(path, zipped=True),
    "a PyTorch checkpoint of the old format": lambda path: _torch_file(path, zipped=False),
    "compressed by gzip": lambda _: gzip.compress(b"{}"),
    "compressed by bzip2": lambda _: bz2.compress(b"{}"),
    "compressed by xz": lambda _: lzma.compress(b"{}"),
    "a zip archive": lambda _: b"PK\x03\x04" + bytes(40),
    "a tar archive": _tar,
    "a safetensors file": _safetensors,
    "an empty file: copy or download it again": lambda _: b"",
}


@pytest.mark.parametrize("description", CONTENTS)
def test_first_bytes_tell_what_a_file_is(tmp_path: Path, description: str) -> None:
    """The phrase says what it is and what to do, as in "it is a Git LFS pointer: run `git lfs pull`"."""
    (tmp_path / "file").write_bytes(CONTENTS[description](tmp_path))
    assert str(describe_content(tmp_path / "file")).startswith(description)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b"a,b\n1,2\n",
        b"\xff\xfe{\x00",
        "häß".encode("latin-1"),
        b"PAR1",
        b"ARROW1\0\0",
        b"(a, b)",
        b"pickle",
    ],
)
def test_text_and_tables_are_nothing_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert describe_content(tmp_path / "file") is None
