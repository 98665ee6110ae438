"""The base's files: trusted at first use, once they have loaded; and never loaded when they have changed since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import flip, put_nan, swap_entries
from pydantic import TypeAdapter, ValidationError

from model.demo import EMBEDDED_BASE, EMBEDDED_SHA256
from model.files import sha256_file, sha256_json
from ops.settings import Settings
from tasks.config import SourceConfig
from tasks.load_weights import check_weights
from tasks.weights import find_weights

pytestmark = pytest.mark.usefixtures("own_root")


def _find(directory: Path | None, **changes: Any) -> Any:
    given = {"weights_dir": str(directory) if directory else None, "tokenizer_dir": None, **changes}
    return find_weights(Settings.load(), "tiny", **given)


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
    "LFS pointer": lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
    "NaN": put_nan,
    "config": lambda d: (d / "config.json").write_text("<html>"),
    "tokenizer": lambda d: (d / "tokenizer.json").write_text("{}"),
    "tokenizer settings": lambda d: (d / "tokenizer_config.json").write_text("{"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_not_recorded_so_the_repaired_one_is_taken(base: Path, kind: str) -> None:
    """OmniParser#34: what never loaded was never trusted. Once the whole files were used, they are."""
    whole = {path.name: path.read_bytes() for path in base.iterdir()}
    BROKEN[kind](base)
    with pytest.raises(ValueError):  # noqa: PT011  # each kind has its own sentence, tested elsewhere
        _find(base)
    for name, content in whole.items():
        (base / name).write_bytes(content)
    assert _find(base) == _find(base)
    BROKEN[kind](base)
    with pytest.raises(ValueError, match="is not the file it was at first use"):
        _find(base)


def test_swapped_entries_between_two_runs(base: Path) -> None:
    """The tokenizer's files are trusted at first use as the weights are."""
    _find(base)
    swap_entries(base)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file it was at first use"):
        _find(base)


def test_a_tokenizer_elsewhere_is_trusted_in_the_same_way(base: Path) -> None:
    """Also beside the embedded weights."""
    weights = _find(None, tokenizer_dir=str(base))
    assert weights.tokenizer_files == {name: EMBEDDED_SHA256[name] for name in weights.tokenizer_files}
    swap_entries(base)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file it was at first use"):
        _find(None, tokenizer_dir=str(base))


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"a": 1}', "\x80", "[" * 100_000])
def test_a_damaged_record_is_one_sentence(base: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "root").mkdir()
    record = tmp_path / "root" / "trusted-weights.json"
    record.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"trusted-weights\.json is damaged: .*\. Mend it, or remove it to trust"):
        _find(base)


def test_a_file_instead_of_its_directory(base: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory but a file: name the directory that holds it"):
        _find(base / "model.safetensors")


@pytest.mark.parametrize("name", ["weights_dir", "tokenizer_dir"])
def test_an_empty_path_is_a_mistake(name: str) -> None:
    """It stood for null: the embedded base was trained in place of the user's."""
    with pytest.raises(ValidationError, match=name):
        TypeAdapter(SourceConfig).validate_python({name: ""})


# The embedded base


def test_the_embedded_base_is_that_of_the_code() -> None:
    """Ties the hashes in the code to the files; ``python -m model.demo.pretrain`` prints them."""
    found = {path.name: sha256_file(path) for path in EMBEDDED_BASE.iterdir() if path.name != "README.md"}
    assert found == EMBEDDED_SHA256


@pytest.mark.parametrize("name", EMBEDDED_SHA256)
def test_a_bit_flip_in_the_embedded_base_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A copy stands for it."""
    monkeypatch.setattr("tasks.weights.EMBEDDED_BASE", base)
    assert _find(None).directory == str(base)
    flip(base / name)
    with pytest.raises(ValueError, match=rf"{name} is not the file of this release.*restore it"):
        _find(None)


def test_the_identity_of_the_base_is_what_it_was(base: Path) -> None:
    """sha256 over name and sha256 of config and weights: trainings of older releases are found again."""
    names = ("config.json", "model.safetensors")
    want = sha256_json({name: sha256_file(EMBEDDED_BASE / name) for name in names})
    assert check_weights(_find(base), "tiny").sha256 == want
    assert check_weights(_find(None), "tiny").sha256 == want
