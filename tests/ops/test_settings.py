"""The data root's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.settings import Settings
from ops.tracking.runs import client


@pytest.mark.parametrize("name", ["what?", "a?b=c", "new\nline", "tab\t", "\udcff"])
def test_a_data_root_that_no_database_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused: a part of the name would be lost, and the database made elsewhere."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / name))
    with pytest.raises(RuntimeError, match="set FINETUNE_DATA_ROOT to another folder"):
        Settings.load()


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
