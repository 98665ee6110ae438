"""Token files as examples: labels, loss weights, the order of an epoch, detection of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.data.tokens import IGNORE, CodeAlpacaDataset, epoch_order, read_meta, verify_tokens


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_labels_and_weights(token_dir: Path, weight: float) -> None:
    """Response tokens have loss weight 1, prompt tokens prompt_loss_weight; labels are the ids, unshifted."""
    dataset = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
    for i in range(len(dataset)):
        row, prompt = dataset[i], int(dataset.lengths[i, 1])
        assert torch.equal(row["labels"][prompt:], row["input_ids"][prompt:])
        assert (row["loss_weights"][prompt:] == 1).all()
        assert (row["loss_weights"][:prompt] == weight).all()
        want = row["input_ids"][:prompt] if weight else torch.full((prompt,), IGNORE)
        assert torch.equal(row["labels"][:prompt], want)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_loss_weight_is_the_sum_over_targets(token_dir: Path, weight: float) -> None:
    """The divisor is the sum of the weights of all targets; the first token is not a target."""
    dataset = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
    rows = np.array([3, 0, 17])
    assert dataset.loss_weight(rows) == sum(dataset[int(i)]["loss_weights"][1:].sum().item() for i in rows)


def test_limit_takes_the_first_rows(token_dir: Path) -> None:
    """eval_rows takes the same rows each time, so that losses are comparable."""
    whole, part = CodeAlpacaDataset(token_dir, "validation"), CodeAlpacaDataset(token_dir, "validation", limit=3)
    assert len(part) == len(part.rows) == 3
    assert all(torch.equal(part[i]["input_ids"], whole[i]["input_ids"]) for i in range(3))


def test_every_whole_row_ends_with_eos_and_learns_it(token_dir: Path, tokenizer: Any) -> None:
    """EOS is a target of weight 1, not IGNORE, although padding has the same id (here 0)."""
    assert tokenizer.eos_token_id == 0
    dataset = CodeAlpacaDataset(token_dir, "train")
    for i in range(len(dataset)):
        row = dataset[i]
        assert {len(row[key]) for key in row} == {int(dataset.lengths[i, 0])}  # no padding to max_length
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
        assert row["loss_weights"][-1] == 1


def test_order_is_a_function_of_seed_and_epoch() -> None:
    """A permutation that is the same in every process, and differs between epochs and between seeds."""
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(50))
        np.random.seed(0)  # global state plays no part
        assert tuple(epoch_order(50, seed, epoch)) == order
    assert epoch_order(6, 42, 0).tolist() == [3, 2, 5, 4, 1, 0]  # must not change with the version of NumPy


def test_verify_tokens_finds_any_flipped_byte(token_dir: Path, tmp_path: Path) -> None:
    """A changed first or last byte of any token file, a truncated file and a missing file are found."""
    directory = tmp_path / "tokens"
    shutil.copytree(token_dir, directory)
    meta = read_meta(directory)
    assert verify_tokens(directory) == meta
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        if path.name != "meta.json":
            for position in (0, len(data) - 1):
                path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
                assert verify_tokens(directory) is None, path.name
        path.write_bytes(data[: len(data) // 2])
        assert verify_tokens(directory) is None, path.name
        path.unlink()
        assert verify_tokens(directory) is None, path.name
        path.write_bytes(data)
    assert verify_tokens(directory) == meta
    assert verify_tokens(tmp_path / "absent") is None


@pytest.mark.parametrize("content", ["null", "[]", "3", '{"files": null}', '{"files": {"a": 1}}', "{", "{}"])
def test_a_damaged_meta_json_is_no_token_directory(tmp_path: Path, content: str) -> None:
    """Whatever stands there, the token files are written again."""
    (tmp_path / "meta.json").write_text(content)
    assert verify_tokens(tmp_path) is None


@pytest.mark.parametrize(
    "change", [{"files": {}}, {"dtype": "<u4"}, {"data_sha256": "x"}, {"counts": None}, {"x": 1}]
)
def test_a_meta_json_that_says_something_else(token_dir: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Every value in it is covered by its own hash: no file need be listed to be taken for whole, else."""
    shutil.copytree(token_dir, tmp_path / "tokens")
    path = tmp_path / "tokens" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert verify_tokens(tmp_path / "tokens") is None
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        CodeAlpacaDataset(tmp_path / "tokens", "train")
