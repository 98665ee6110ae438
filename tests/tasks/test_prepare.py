"""Token files are made once for each combination of inputs, and never used damaged."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from model.data.config import PrepareConfig
from model.data.preparing import training_keys
from model.files import sha256_json
from model.net.tokenizer import VOCABULARY_FILES, load_tokenizer
from tasks.config import SourceConfig
from tasks.download import download
from tasks.prepare import find_or_write_tokens
from tasks.references import Sources, TokensRef

CONFIG = PrepareConfig(max_length=80, validation_share=0.2)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path, gpt2_dir: Path) -> Sources:
    """A tiny model and 60 rows."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    with disable_run_logger():
        return download.fn(SourceConfig("tiny", str(data_dir), weights_dir=str(gpt2_dir)))


def _prepare(sources: Sources, config: PrepareConfig = CONFIG) -> TokensRef:
    with disable_run_logger():
        return find_or_write_tokens(sources, config)


def test_equal_inputs_are_tokenised_once(sources: Sources) -> None:
    """The second call finds the first one's files."""
    first = _prepare(sources)
    written = (Path(first.directory) / "meta.json").stat().st_mtime_ns
    assert _prepare(sources) == first
    assert (Path(first.directory) / "meta.json").stat().st_mtime_ns == written


def test_damaged_files_are_written_anew(sources: Sources) -> None:
    """A flipped byte in the cache is found and mended, not trained on."""
    first = _prepare(sources)
    file = Path(first.directory) / "train.ids.bin"
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert _prepare(sources) == first
    assert file.read_bytes() == whole


def test_other_settings_are_other_files(sources: Sources) -> None:
    """The key covers the settings."""
    assert _prepare(sources).key != _prepare(sources, PrepareConfig(max_length=70, validation_share=0.2)).key


def test_a_subset_is_known_by_its_keys(sources: Sources, tmp_path: Path) -> None:
    """Not by the path of the file that holds them: the same rows are not tokenised again, other rows are."""
    whole = _prepare(sources)
    train, _ = training_keys(
        sources.dataset.paths,
        load_tokenizer(sources.weights.tokenizer_directory, 320),
        CONFIG,
    )
    tokens = []
    for name, keys in (("one", train[:9]), ("two", train[:9]), ("three", train[9:18])):
        np.save(tmp_path / f"{name}.npy", keys)
        tokens.append(_prepare(sources, replace(CONFIG, subset_keys=str(tmp_path / f"{name}.npy"))))
    first, again, other = tokens
    assert first == again
    assert len({whole.key, first.key, other.key}) == 3
    assert first.counts["rows"]["train"] == other.counts["rows"]["train"] == 9


def test_max_length_beyond_the_context(sources: Sources) -> None:
    """The model has 96 positions; asking for more is refused before anything is tokenised."""
    with pytest.raises(ValueError, match="max_length 97 is beyond the model's context of 96"):
        _prepare(sources, PrepareConfig(max_length=97))


def test_a_file_that_changes_after_it_was_hashed_ends_the_run(sources: Sources, tmp_path: Path) -> None:
    """Tokens never lie under the hash of another content: nothing is written, and the message names the file."""
    file = Path(sources.dataset.splits["train"][0].path)
    copy = tmp_path / "train.jsonl"
    copy.write_bytes(file.read_bytes())
    moved = replace(sources.dataset.splits["train"][0], path=str(copy))
    changing = replace(sources, dataset=replace(sources.dataset, splits={"train": [moved]}))
    copy.write_bytes(copy.read_bytes() + b'{"prompt": "another row", "completion": "x"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl has been changed since this run began"):
        _prepare(changing)
    assert list((tmp_path / "root" / "tokens").iterdir()) == []
    copy.write_bytes(file.read_bytes())
    assert _prepare(changing).counts == _prepare(sources).counts


def test_token_files_of_earlier_versions_are_found(sources: Sources) -> None:
    """The seed of the splits had another name: the key of the same rows and settings must not change."""
    files = {split: [file.sha256 for file in found] for split, found in sources.dataset.splits.items()}
    hashes = sources.weights.tokenizer_files
    tokenizer = {name: hashes[name] for name in VOCABULARY_FILES if name in hashes}
    settings = {
        "seed": 42, "max_length": 80, "subset_start": 0, "subset_count": None, "subset_keys": None,
        "test_share": 0.1, "validation_share": 0.2, "max_dropped_share": 0.05,
    }  # fmt: skip
    determinants = {"code": 3, "config": settings, "rows": files, "tokenizer": tokenizer}
    assert _prepare(sources).key == sha256_json(determinants)


def test_small_splits_warn(
    sources: Sources, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the token files are those of an earlier run; what it says to set gives enough rows."""
    monkeypatch.setattr("tasks.prepare.get_run_logger", lambda: logging.getLogger("rows"))
    for _ in range(2):
        caplog.clear()
        counts = find_or_write_tokens(sources, CONFIG).counts["rows"]
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        validation, test = warned
        assert validation == (
            f"the validation split has {counts['validation']} rows, and they choose the best step: with fewer than "
            "30 that is mostly chance; add rows, or a file with the word validation in its name"
        )
        assert test.startswith(f"the test split has {counts['test']} rows, and they say whether a model is better:")
