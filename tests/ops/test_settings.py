"""The data root's name."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from ops.mistakes import sentence
from ops.settings import DataRootError, Settings
from ops.tracking.connection import client


@pytest.mark.parametrize("name", ["what?", "a?b=c", "new\nline", "tab\t", "\udcff"])
def test_a_data_root_that_no_database_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused: a part of the name would be lost, and the database made elsewhere."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / name))
    with pytest.raises(ValueError, match="set FINETUNE_DATA_ROOT to another folder"):
        Settings.load()


def test_a_data_root_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, and a user that does not exist; the setting is named."""
    (tmp_path / "file").touch()
    for value, said in (
        (f"{tmp_path}/file", f"the data root {tmp_path}/file is a file: set FINETUNE_DATA_ROOT to a folder"),
        ("~nobody-of-this-name/x", "FINETUNE_DATA_ROOT '~nobody-of-this-name/x' is not a path: "),
        (f"{tmp_path}/file/x", f"FINETUNE_DATA_ROOT '{tmp_path}/file/x' is not a path: "),
    ):
        monkeypatch.setenv("FINETUNE_DATA_ROOT", value)
        with pytest.raises(ValueError, match=re.escape(said)):
            Settings.load()


def test_what_cannot_be_written_is_one_sentence() -> None:
    """With the file, if it is not the root itself, and the remedy."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/root/prefect")
    said = "nothing can be written in the data root /root (/root/prefect: Read-only file system): set FINETUNE_DATA_"
    assert sentence(DataRootError.of(Path("/root"), error)).startswith(said)
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/root")
    assert "data root /root (Read-only file system): set" in sentence(DataRootError.of(Path("/root"), error))


def test_any_other_character_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's database and artifacts lie in the data root, and nothing lies beside it."""
    root = tmp_path / "a b#c%20d&e=f;g$HOME~'\"ü+@:"
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = Settings.load()
    mlflow = client(settings.tracking_uri)
    run = mlflow.create_run(mlflow.create_experiment("x", settings.artifacts.as_uri()))
    mlflow.log_text(run.info.run_id, "text", "file.txt")
    assert list(tmp_path.iterdir()) == [root]
    assert (root / "mlflow" / "mlflow.db").exists()
    assert [path.read_text() for path in settings.artifacts.rglob("file.txt")] == ["text"]


def test_a_user_without_a_home_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cactus#1803: in a container the user may have no entry in /etc/passwd; Prefect needs a home."""

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    Settings.load()
    assert Path.home() == Path("/home/me")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    Settings.load()
    assert Path.home() == tmp_path / "home"
