"""Fuzzing of what the tasks read on their own: the record of trusted files, and paths in parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzzing import PLACES, check_message, hypothesis, limits, mutated_json, put, settings, st

from model.demo import EMBEDDED_BASE
from model.files import path_of
from ops.settings import Settings
from tasks.weights import find_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root in which the files of ``base`` beside it were used once."""
    root = tmp_path_factory.mktemp("fuzz") / "root"
    shutil.copytree(EMBEDDED_BASE, root.with_name("base"))
    _find(root)
    return root


@pytest.fixture(scope="module")
def known(root: Path) -> dict[str, str]:
    """The record after that."""
    return dict(json.loads((root / "trusted-weights.json").read_text()))


def _find(root: Path, **changes: Any) -> Any:
    given = {"weights_dir": str(root.with_name("base")), "tokenizer_dir": None, **changes}
    return find_weights(Settings(root, ""), "tiny", **given)


@settings(few=15, share=0.05)
@hypothesis.given(data=st.data())
def test_any_record_of_trusted_files_is_obeyed_or_refused(root: Path, known: dict[str, str], data: Any) -> None:
    """The hashes in it are those of the files, or the files are refused."""
    path = root / "trusted-weights.json"
    place = data.draw(PLACES)
    put(path, data.draw(mutated_json(known, 2)), place)
    try:
        with limits(root, root.with_name("base")):
            found = _find(root)
    except ValueError as error:
        check_message(error, str(path))
        return
    after = json.loads(path.read_text())
    assert known.items() <= after.items()
    assert {name: known[str(root.with_name("base") / name)] for name in found.files} == found.files


_PATHS = st.text(max_size=20) | st.sampled_from(
    [
        "~",
        "~nobody-has-this-name",
        "~root/x",
        "x" * 300,
        "/".join(["x" * 200] * 30),
        "\0",
        "\ud800",
        "..",
        "//",
        "loop/x",
    ]
)


@settings(few=60)
@hypothesis.given(value=_PATHS)
def test_any_path_is_a_path_or_refused(root: Path, value: str) -> None:
    """As a parameter that names a file or a folder."""
    loop = root / "loop"
    if not loop.is_symlink():
        loop.symlink_to("loop")
    for given in (value, str(root / "loop" / "x")):
        try:
            path = path_of("weights_dir", given)
        except ValueError as error:
            check_message(error, "weights_dir")
        else:
            assert path.is_absolute()
            assert path.is_dir() or not path.is_dir()  # no error
    try:
        with limits(root):
            _find(root, weights_dir=str(root / "loop"), tokenizer_dir=value or "x")
    except (ValueError, FileNotFoundError) as error:
        check_message(error, "weights_dir", "tokenizer_dir")
