"""Cached outputs of the trunk: equal to the model's, reused only for the same trunk and rows, never when damaged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import flip
from torch import Tensor

from model import GPTModel, freeze_bottom_layers
from model.data.packing import Pack, pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.scoring import row_losses
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.net.attention import Rows

CPU = torch.device("cpu")
ROWS = 42
TRAIN = TrainConfig(epochs=2, batch_size=8, eval_freq=100, micro_batch_tokens=150, precision="fp32")


@pytest.fixture(autouse=True)
def _slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mocks a processor on which reading a file is faster than computing this small trunk."""
    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1e30)


@pytest.fixture
def load(gpt2_dir: Path) -> Callable[..., GPTModel]:
    """load(unfrozen): a fresh model in eval mode."""

    def fresh(unfrozen: int = 1) -> GPTModel:
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, unfrozen)
        return model.eval()

    return fresh


@pytest.fixture
def outputs_of(load: Callable[..., GPTModel], token_dir: Path) -> Callable[..., TrunkOutputs]:
    """outputs_of(directory, model=..., limit=..., dtype=..., ...): a cache of the training rows."""

    def build(
        directory: Path | None = None,
        model: GPTModel | None = None,
        split: str = "train",
        tokens: Path = token_dir,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        chunk_tokens: int = 200,
        uses: float = 3,
        max_bytes: int = 10**9,
    ) -> TrunkOutputs:
        dataset = CodeAlpacaDataset(tokens, split, limit=limit)
        order = np.random.default_rng(1).permutation(len(dataset))
        engine = Engine(model or load(), dtype)
        return TrunkOutputs(engine, dataset, order, chunk_tokens, uses, TrunkCacheConfig(directory, max_bytes))

    return build


def ask(outputs: TrunkOutputs, rows: list[int] | None = None) -> dict[int, Tensor]:
    """Outputs of rows, requested as one pack."""
    numbers = np.arange(len(outputs.dataset)) if rows is None else np.array(rows)
    batch = pack(outputs.dataset, numbers, CPU)
    parts = outputs(batch).split(batch.documents.lengths)
    return {row: part.clone() for row, part in zip(batch.rows.tolist(), parts, strict=True)}


def same_bits(left: dict[int, Tensor], right: dict[int, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[row], right[row]) for row in left)


def inputs_of(outputs: TrunkOutputs, rows: list[int]) -> int:
    return int((outputs.dataset.lengths[rows, 0] - 1).sum())


def files(directory: Path, name: str = "values.bin") -> list[Path]:
    return sorted(directory.glob(f"*/{name}"))


# Values


@pytest.mark.parametrize("place", ["file", "host", "none"])
@torch.no_grad()
def test_outputs_are_the_models(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, place: str) -> None:
    """Outputs equal the model's at the first request and at later ones, in the order of the pack."""
    outputs = outputs_of(tmp_path if place == "file" else None, uses=1 if place == "none" else 3)
    assert outputs.place == place
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    for rows in (order[:20], order[10:], order):
        got = ask(outputs, rows)
        assert list(got) == rows
        for row in rows:
            ids = outputs.dataset[row]["input_ids"][:-1]
            want = outputs.engine.model.trunk(ids[None], torch.arange(len(ids))[None], Rows())[0]
            torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["file", "host"])
def test_any_order_gets_the_same_bits(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, place: str) -> None:
    """Rows are computed in fixed chunks, whichever is requested first: a resumed training repeats the original."""
    first = outputs_of(tmp_path / "one" if place == "file" else None)
    want = ask(first)
    assert same_bits(ask(first), want)
    for seed in range(3):
        other = outputs_of(tmp_path / f"cache{seed}" if place == "file" else None)
        order = np.random.default_rng(seed).permutation(ROWS).tolist()
        got: dict[int, Tensor] = {}
        for start in range(0, ROWS, 5):
            got |= ask(other, order[start : start + 5])
        assert got.keys() == want.keys()
        assert all(torch.equal(got[row], want[row]) for row in want)


def test_chunks_are_computed_whole(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rows are requested or damaged, whole chunks are computed: matrix products keep their shapes."""
    computed: list[list[int]] = []
    trunk = Engine.trunk

    def spy(self: Engine, batch: Pack) -> Tensor:
        computed.append(batch.rows.tolist())
        return trunk(self, batch)

    monkeypatch.setattr(Engine, "trunk", spy)
    outputs = outputs_of(tmp_path)
    chunks = [chunk.tolist() for chunk in outputs.chunks]
    assert len(chunks) > 5
    assert sorted(np.concatenate(outputs.chunks).tolist()) == list(range(ROWS))
    assert max(map(len, chunks)) > 1
    for row in np.random.default_rng(0).permutation(ROWS).tolist():
        ask(outputs, [row])
    assert sorted(computed) == sorted(chunks)
    spoil_byte(files(tmp_path)[0])
    computed.clear()
    ask(outputs_of(tmp_path))
    assert len(computed) == 1
    assert computed[0] in chunks


def test_scores_are_the_same_with_and_without(
    outputs_of: Callable[..., TrunkOutputs], load: Callable[..., GPTModel], tmp_path: Path
) -> None:
    """The loss is the same with and without the cache, the first and the second time."""
    outputs = outputs_of(tmp_path, split="validation")
    want, _ = row_losses(Engine(load(), torch.float32), outputs.dataset, 150)
    for _ in range(2):
        got, _ = row_losses(outputs.engine, outputs.dataset, 150, outputs)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert outputs.hit_share == 0.5


# Reuse


def test_second_process_computes_nothing(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """With the same directory, trunk and rows everything is read, bit for bit, for any size of chunks."""
    first = outputs_of(tmp_path)
    want = ask(first)
    assert first.computed == inputs_of(first, list(range(ROWS)))
    for chunk_tokens in (200, 1, 10_000):
        second = outputs_of(tmp_path, chunk_tokens=chunk_tokens)
        assert same_bits(ask(second), want)
        assert second.computed == 0
        assert second.hit_share == 1.0
    assert len(files(tmp_path)) == 1


def test_partly_filled_file_is_used_as_far_as_it_goes(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path
) -> None:
    """Rows that a stopped process had computed are read, the others computed."""
    first = outputs_of(tmp_path, chunk_tokens=1)
    some = ask(first, [0, 5, 9])
    second = outputs_of(tmp_path, chunk_tokens=1)
    got = ask(second, [9, 0, 5, 7])
    assert all(torch.equal(got[row], some[row]) for row in some)
    assert second.computed == inputs_of(second, [7])


def test_other_top_finds_it(
    outputs_of: Callable[..., TrunkOutputs], load: Callable[..., GPTModel], tmp_path: Path
) -> None:
    """A model with other trained blocks and norm, but the same trunk, reuses the file."""
    want = ask(outputs_of(tmp_path))
    champion = load()
    for parameter in (p for p in champion.parameters() if p.requires_grad):
        parameter.data += 0.1
    second = outputs_of(tmp_path, champion)
    assert same_bits(ask(second), want)
    assert second.computed == 0


def shift(name: str) -> Callable[[GPTModel], None]:
    def change(model: GPTModel) -> None:
        dict(model.named_parameters())[name].data.view(-1)[5] += 1e-3

    return change


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.0.ln_1.bias", "h.1.mlp.c_proj.weight"])
def test_other_trunk_does_not_find_it(
    outputs_of: Callable[..., TrunkOutputs], load: Callable[..., GPTModel], tmp_path: Path, name: str
) -> None:
    """A trunk that differs in one number does not reuse the file."""
    ask(outputs_of(tmp_path))
    model = load()
    shift(name)(model)
    other = outputs_of(tmp_path, model)
    ask(other)
    assert other.computed == inputs_of(other, list(range(ROWS)))
    assert len(files(tmp_path)) == 2


def test_other_depth_rows_ids_or_dtype_do_not_find_it(
    outputs_of: Callable[..., TrunkOutputs], load: Callable[..., GPTModel], token_dir: Path, tmp_path: Path
) -> None:
    """The key covers depth, rows, ids and dtype."""
    directory = tmp_path / "cache"
    ask(outputs_of(directory))
    changed = tmp_path / "tokens"
    changed.mkdir()
    for path in token_dir.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    flip(changed / "train.ids.bin", 0)
    others: list[dict[str, Any]] = [
        {"model": load(2)},
        {"split": "validation"},
        {"limit": ROWS - 1},
        {"tokens": changed},
        {"dtype": torch.bfloat16},
    ]
    for number, settings in enumerate(others, 2):
        other = outputs_of(directory, **settings)
        ask(other)
        assert other.computed == inputs_of(other, list(range(len(other.dataset))))
        assert len(files(directory)) == number


def test_second_training_computes_nothing(load: Callable[..., GPTModel], token_dir: Path, tmp_path: Path) -> None:
    """A second training on the same rows reads all outputs of the first, for training and validation."""
    cache = TrunkCacheConfig(tmp_path / "cache")
    champion = load()
    first = train(champion, token_dir, TRAIN, tmp_path / "one", "one", cache=cache)
    assert first.trunk_hit_share == 0.5  # two epochs
    assert len(files(tmp_path / "cache")) == 2
    before = [path.read_bytes() for path in files(tmp_path / "cache")]
    second = train(champion, token_dir, TRAIN, tmp_path / "two", "two", cache=cache)
    assert second.trunk_hit_share == 1.0
    assert [path.read_bytes() for path in files(tmp_path / "cache")] == before


# Damage


def spoil_byte(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        [byte] = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 + 1)


@pytest.mark.parametrize("name", ["values.bin", "checksums.bin"])
@pytest.mark.parametrize("damage", [spoil_byte, cut, lambda path: path.write_bytes(b""), Path.unlink])
def test_damage_is_computed_anew(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """Damaged, cut, emptied or deleted files are not used, but repaired."""
    want = ask(outputs_of(tmp_path))
    [path] = files(tmp_path, name)
    damage(path)
    second = outputs_of(tmp_path)
    assert same_bits(ask(second), want)
    assert second.computed > 0
    if damage is spoil_byte:
        assert second.computed <= 200 + 80  # its chunk only
    third = outputs_of(tmp_path)
    assert same_bits(ask(third), want)
    assert third.computed == 0


def test_longer_file_is_cut_to_size(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """Bytes beyond the outputs are cut off."""
    want = ask(outputs_of(tmp_path))
    [path] = files(tmp_path)
    with path.open("ab") as stream:
        stream.write(b"more")
    second = outputs_of(tmp_path)
    assert same_bits(ask(second), want)
    assert path.stat().st_size == second.bytes


# Limits


def test_beyond_the_budget_nothing_is_kept(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """Above the limit outputs are computed each time, without a file; at exactly the limit all are kept."""
    size = outputs_of().bytes
    assert size == inputs_of(outputs_of(), list(range(ROWS))) * 32 * 4
    outputs = outputs_of(tmp_path / "cache", max_bytes=size - 1)
    ask(outputs, [1, 2])
    ask(outputs, [1, 2])
    assert outputs.computed == outputs.requested == 2 * inputs_of(outputs, [1, 2])
    assert (outputs.place, outputs.bytes_kept, outputs.hit_share) == ("none", 0, 0.0)
    assert not files(tmp_path / "cache")
    assert outputs_of(tmp_path / "cache", max_bytes=size).bytes_kept == size


def directory_of(outputs: TrunkOutputs, root: Path) -> Path:
    """The directory whose file has the size of that cache."""
    [path] = [path.parent for path in files(root) if path.stat().st_size == outputs.bytes]
    return path


@pytest.mark.parametrize("used_again", [False, True])
def test_file_used_longest_ago_makes_room(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, used_again: bool
) -> None:
    """Only the file that was not used for the longest time is deleted; reading counts as use."""
    train_rows, validation = outputs_of(tmp_path), outputs_of(tmp_path, split="validation")
    old, new = directory_of(train_rows, tmp_path), directory_of(validation, tmp_path)
    os.utime(old, (1000, 1000))
    os.utime(new, (2000, 2000))
    if used_again:
        outputs_of(tmp_path)
        old, new = new, old
    three = train_rows.bytes + validation.bytes + outputs_of(split="test").bytes
    test = outputs_of(tmp_path, split="test", max_bytes=three - 1)
    assert test.place == "file"
    assert {path.parent for path in files(tmp_path)} == {new, directory_of(test, tmp_path)}
    ask(train_rows)  # a deleted file that is still mapped can be read


def test_no_room_is_made_without_need(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """Three files within the limit are kept."""
    for split in ("train", "validation", "test"):
        outputs_of(tmp_path, split=split)
    assert len(files(tmp_path)) == 3


def test_validation_does_not_evict_its_own_trainings_file(
    load: Callable[..., GPTModel], outputs_of: Callable[..., TrunkOutputs], token_dir: Path, tmp_path: Path
) -> None:
    """A limit of the size of both files of a training keeps both: a file's size counts once."""
    together = sum(outputs_of(split=split).bytes for split in ("train", "validation"))
    cache = TrunkCacheConfig(tmp_path / "cache", max_bytes=together)
    for name, share in (("one", 0.5), ("two", 1.0)):
        result = train(load(), token_dir, TRAIN, tmp_path / name, name, cache=cache)
        assert result.trunk_hit_share == share
        assert len(files(tmp_path / "cache")) == 2


def test_validation_has_what_the_training_leaves(
    load: Callable[..., GPTModel], outputs_of: Callable[..., TrunkOutputs], token_dir: Path, tmp_path: Path
) -> None:
    """If the limit has room for the training rows only, validation gets no file."""
    cache = TrunkCacheConfig(tmp_path / "cache", max_bytes=outputs_of().bytes)
    train(load(), token_dir, TRAIN, tmp_path / "training", "me", cache=cache)
    assert [path.stat().st_size for path in files(tmp_path / "cache")] == [cache.max_bytes]


def test_nothing_is_kept_for_a_single_use(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """For one epoch outputs are not kept in memory, but in a file for later runs."""
    assert outputs_of(uses=1).place == "none"
    assert outputs_of(uses=1.5).place == "host"
    assert outputs_of(tmp_path, uses=1).place == "file"


def test_nothing_frozen_nothing_kept(
    outputs_of: Callable[..., TrunkOutputs], load: Callable[..., GPTModel], tmp_path: Path
) -> None:
    """Without frozen blocks nothing is kept: embeddings are as fast, and trained ones would change the outputs."""
    assert outputs_of(tmp_path / "cache", load(3)).place == "none"
    assert not files(tmp_path / "cache")


def test_no_file_where_computing_is_faster_than_reading(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of a trunk that is computed faster than a file is read are kept in memory only."""
    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1.0)
    assert outputs_of(tmp_path / "cache").place == "host"
    assert not files(tmp_path / "cache")


@pytest.mark.parametrize("known", [False, True])
def test_room_is_taken_when_a_file_is_opened(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Blocks are allocated at once: a mapped sparse file would kill the process on a full disk. Mocks a full disk."""
    if known:
        first = outputs_of(tmp_path)
        ask(first, [0])
        blocks = sum(path.stat().st_blocks for path in tmp_path.rglob("*.bin"))
        assert 512 * blocks >= first.bytes  # not sparse, though few rows are in it

    def no_room(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    later = outputs_of(tmp_path)
    assert later.place == "host"
    assert same_bits(ask(later), ask(outputs_of()))
    assert {path.name for path in tmp_path.rglob("*.bin")} == ({"values.bin", "checksums.bin"} if known else set())


def test_no_file_on_a_full_disk(
    outputs_of: Callable[..., TrunkOutputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file takes at most half of the free space; an existing file is used in any case."""
    size = outputs_of().bytes
    usage = type("usage", (), {"free": 2 * size - 1})
    monkeypatch.setattr("model.engine.trunk_file.shutil.disk_usage", lambda path: usage)
    assert outputs_of(tmp_path).place == "host"
    monkeypatch.undo()
    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1e30)
    ask(outputs_of(tmp_path))
    monkeypatch.setattr("model.engine.trunk_file.shutil.disk_usage", lambda path: usage)
    assert outputs_of(tmp_path).place == "file"


# Numbers for the log


def test_hit_share_by_hand(outputs_of: Callable[..., TrunkOutputs]) -> None:
    """Chunks of one row: only the third row is new in the second request."""
    outputs = outputs_of(chunk_tokens=1)
    assert outputs.hit_share == 0.0
    ask(outputs, [0, 1])
    old, new = inputs_of(outputs, [0, 1]), inputs_of(outputs, [2])
    assert (outputs.requested, outputs.computed, outputs.hit_share) == (old, old, 0.0)
    ask(outputs, [0, 1, 2])
    assert (outputs.requested, outputs.computed) == (2 * old + new, old + new)
    assert outputs.hit_share == pytest.approx(old / (2 * old + new))


def test_hit_share_is_a_share(outputs_of: Callable[..., TrunkOutputs]) -> None:
    """It is 0, not negative, if more was computed than requested (a row's whole chunk)."""
    outputs = outputs_of(chunk_tokens=10_000)
    ask(outputs, [3])
    assert outputs.computed > outputs.requested
    assert outputs.hit_share == 0.0


def test_describe(outputs_of: Callable[..., TrunkOutputs], tmp_path: Path) -> None:
    """The line has size, place and share."""
    assert outputs_of(uses=1).describe() == "frozen blocks' outputs are computed anew in each pass"
    for place, outputs in (("in memory", outputs_of()), ("in a file", outputs_of(tmp_path))):
        ask(outputs)
        ask(outputs)
        tokens = 2 * inputs_of(outputs, list(range(ROWS)))
        kept = f"{outputs.bytes / 1e9:.2f} GB, 50% of {tokens:,} tokens taken from there"
        assert outputs.describe() == f"frozen blocks' outputs kept {place}: {kept}"
