"""The embedded default's inputs are complete and always the same."""

from __future__ import annotations

from pathlib import Path

import torch

from model import load_gpt_model
from model.demo import demo_rows, write_demo
from model.files import sha256_file
from model.rows import find_splits, normalize_row, prompt_key, read_records


def test_demo_rows_are_disjoint_and_fixed() -> None:
    """#8: no prompt stands in both splits, and two calls give the same rows."""
    train, test = demo_rows()
    keys = [[prompt_key(normalize_row(row)["prompt"]) for row in rows] for rows in (train, test)]
    assert len(set(keys[0]) | set(keys[1])) == len(train) + len(test) > 300
    assert len(test) == (len(train) + len(test)) // 10
    assert demo_rows() == (train, test)
    for row in train + test:
        compile(row["completion"], "demo", "exec")  # the references are Python


def test_demo_directory_is_a_data_set_and_a_base(tmp_path: Path) -> None:
    """Both halves are read by the same loaders as real ones; two machines write the same bytes."""
    state = torch.get_rng_state()
    for name in ("one", "two"):
        write_demo(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    splits = find_splits(tmp_path / "one" / "rows")
    counts = {split: sum(len(list(read_records(path))) for path in paths) for split, paths in splits.items()}
    assert counts == {split: len(rows) for split, rows in zip(("train", "test"), demo_rows(), strict=True)}
    model, tokenizer = load_gpt_model("tiny", tmp_path / "one" / "base")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == "<|endoftext|>"
    for name in ("rows/train.jsonl", "rows/test.jsonl", "base/model.safetensors", "base/tokenizer.json"):
        assert sha256_file(tmp_path / "one" / name) == sha256_file(tmp_path / "two" / name), name


def test_existing_demo_is_left_alone(tmp_path: Path) -> None:
    """A second run neither rewrites nor completes."""
    (tmp_path / "demo").mkdir()
    write_demo(tmp_path / "demo")
    assert not list((tmp_path / "demo").iterdir())
