"""Parts of a path that another user could replace, with real owners where the tests run as root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ops.machine.paths import replaceable_part

OTHER = 12345  # a user id that is neither root's nor this process's
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that only this user may write into."""
    tmp_path.chmod(0o700)
    return tmp_path


def _folder(path: Path, mode: int, owner: int | None = None) -> Path:
    path.mkdir()
    path.chmod(mode)
    if owner is not None:
        os.chown(path, owner, owner)
    return path


def test_own_folders_are_safe(base: Path) -> None:
    """Also those that do not exist yet, and the default, in /tmp."""
    assert replaceable_part(base) is None
    assert replaceable_part(base / "a" / "b") is None
    assert replaceable_part(Path("/tmp/finetune-locks")) is None
    assert replaceable_part(Path("/")) is None


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_may_change(base: Path, mode: int) -> None:
    """Whatever lies in it can be renamed and replaced, at any depth below."""
    shared = _folder(base / "shared", mode)
    assert replaceable_part(shared) is None
    assert replaceable_part(shared / "locks") == shared
    (shared / "own").mkdir(mode=0o700)
    assert replaceable_part(shared / "own" / "locks") == shared


def test_a_folder_like_tmp(base: Path) -> None:
    """Entries of this user cannot be replaced in it."""
    shared = _folder(base / "shared", 0o1777)
    _folder(shared / "own", 0o700)
    assert replaceable_part(shared / "locks") is None
    assert replaceable_part(shared / "own" / "locks") is None


@as_root
def test_another_users_folder(base: Path) -> None:
    """As the last part it may be shared; on the way to it, its owner could replace what lies in it."""
    shared = _folder(base / "shared", 0o1777)
    theirs = _folder(shared / "theirs", 0o755, OTHER)
    assert replaceable_part(theirs) is None
    assert replaceable_part(theirs / "locks") == theirs
    elsewhere = _folder(base / "elsewhere", 0o755, OTHER)
    assert replaceable_part(elsewhere / "locks") == elsewhere


def test_links_are_followed(base: Path) -> None:
    """A link of this user is safe if the way that it leads is; its own folder counts, and so does its target's."""
    _folder(base / "good", 0o700)
    shared = _folder(base / "shared", 0o777)
    (shared / "inside").mkdir()
    (base / "link").symlink_to(base / "good")
    (base / "relative").symlink_to("link/../good")
    (base / "bad").symlink_to(shared / "inside")
    assert replaceable_part(base / "link" / "locks") is None
    assert replaceable_part(base / "relative" / "locks") is None
    assert replaceable_part(base / "bad" / "locks") == shared
    assert replaceable_part(base / "good" / ".." / "shared" / "locks") == shared
    (base / "circle").symlink_to(base / "circle")
    with pytest.raises(OSError, match="circle/locks"):
        replaceable_part(base / "circle" / "locks")


@as_root
def test_another_users_link(base: Path) -> None:
    """In a folder like /tmp anyone may have made it, and its owner can change it at any time."""
    shared = _folder(base / "shared", 0o1777)
    (base / "target").mkdir()
    (shared / "link").symlink_to(base / "target")
    os.lchown(shared / "link", OTHER, OTHER)
    assert replaceable_part(shared / "link" / "locks") == shared / "link"
