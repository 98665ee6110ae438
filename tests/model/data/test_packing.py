"""Packs computed by hand: positions, predictors, targets and weights; and the division of rows into groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data.packing import deal, pack, split_evenly
from model.data.tokens import CodeAlpacaDataset, write_meta
from model.net.attention import Documents, Rows

CPU = torch.device("cpu")
# Row number -> its ids and the length of its prompt.
ROWS = [
    ([10, 11, 12, 13], 2),
    ([20, 21, 22], 3),  # all prompt
    ([65_000, 65_535, 0], 1),
    ([40, 41, 42, 43, 0], 4),
    ([50], 1),  # a single token predicts nothing
]


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[..., CodeAlpacaDataset]:
    """dataset_of(dtype=..., weight=...): ROWS as token files."""

    def build(dtype: str = "<u2", weight: float = 0.0) -> CodeAlpacaDataset:
        write_meta(tmp_path, {"dtype": dtype})
        np.array([i for ids, _ in ROWS for i in ids], dtype=dtype).tofile(tmp_path / "train.ids.bin")
        np.save(tmp_path / "train.lengths.npy", np.array([(len(ids), p) for ids, p in ROWS], dtype=np.int32))
        return CodeAlpacaDataset(tmp_path, "train", prompt_loss_weight=weight)

    return build


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_pack_by_hand(dataset_of: Callable[..., CodeAlpacaDataset], dtype: str) -> None:
    """Rows in the given order; positions restart; last tokens are not inputs; only response tokens are targets."""
    batch = pack(dataset_of(dtype), np.array([3, 0, 2]), CPU)
    assert batch.rows.tolist() == [3, 0, 2]
    assert batch.ids.tolist() == [40, 41, 42, 43, 10, 11, 12, 65_000, 65_535]
    assert batch.ids.dtype == batch.targets.dtype == torch.long
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.predictors.tolist() == [3, 5, 6, 7, 8]
    assert batch.targets.tolist() == [0, 12, 13, 65_535, 0]
    assert batch.owner.tolist() == [0, 1, 1, 2, 2]
    assert batch.weights is None
    assert batch.documents.lengths == [4, 3, 2]
    assert batch.documents.begins.tolist() == [0, 0, 0, 0, 4, 4, 4, 7, 7]
    assert batch.documents.ends.tolist() == [4, 4, 4, 4, 7, 7, 7, 9, 9]
    assert batch.documents.begins.dtype == batch.documents.ends.dtype == torch.int32


def test_slots_are_indices_among_all_inputs(dataset_of: Callable[..., CodeAlpacaDataset]) -> None:
    """Rows of 4, 3, 3, 5 and 1 tokens have inputs 0-2, 3-4, 5-6, 7-10 and none, independent of the pack."""
    dataset = dataset_of()
    assert pack(dataset, np.array([3, 0, 2]), CPU).slots.tolist() == [7, 8, 9, 10, 0, 1, 2, 5, 6]
    assert pack(dataset, np.array([2]), CPU).slots.tolist() == [5, 6]


def test_rows_without_target_are_left_out(dataset_of: Callable[..., CodeAlpacaDataset]) -> None:
    """Rows of prompt only or of a single token are left out; owners are indices into the remaining rows."""
    batch = pack(dataset_of(), np.arange(5), CPU)
    assert batch.rows.tolist() == [0, 2, 3]
    assert batch.owner.tolist() == [0, 0, 1, 1, 2]
    none = pack(dataset_of(), np.array([1, 4]), CPU)
    assert len(none.rows) == len(none.ids) == len(none.targets) == len(none.owner) == 0
    assert none.documents.begins.tolist() == none.documents.ends.tolist() == []


def test_prompt_loss_weight_makes_every_token_but_the_first_a_target(
    dataset_of: Callable[..., CodeAlpacaDataset],
) -> None:
    """Prompt tokens have the given weight, response tokens 1; a row that is all prompt takes part."""
    dataset = dataset_of(weight=0.25)
    batch = pack(dataset, np.array([0, 1, 3, 4]), CPU)
    assert batch.rows.tolist() == [0, 1, 3]
    assert batch.predictors.tolist() == list(range(9))
    assert batch.targets.tolist() == [11, 12, 13, 21, 22, 41, 42, 43, 0]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.25, 1, 1, 0.25, 0.25, 0.25, 0.25, 0.25, 1]
    assert batch.weights.sum().item() == dataset.loss_weight(np.array([0, 1, 3]))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_first_token_of_a_row_without_a_prompt_is_no_target(tmp_path: Path, weight: float) -> None:
    """Two rows of five tokens, with prompts of 0 and 1 tokens: four targets each, for any weight of the prompt."""
    write_meta(tmp_path, {"dtype": "<u2"})
    np.arange(10, dtype="<u2").tofile(tmp_path / "train.ids.bin")
    np.save(tmp_path / "train.lengths.npy", np.array([(5, 0), (5, 1)], dtype=np.int32))
    dataset = CodeAlpacaDataset(tmp_path, "train", prompt_loss_weight=weight)
    assert len(pack(dataset, np.array([0, 1]), CPU).targets) == dataset.loss_weight(np.array([0, 1])) == 8


def test_weights_sum_to_the_divisor_of_the_loss(token_dir: Path) -> None:
    """On the rows of token_dir, with and without weight on the prompt."""
    rows = np.array([3, 0, 17])
    for weight in (0.0, 0.5):
        dataset = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
        batch = pack(dataset, rows, CPU)
        total = len(batch.targets) if batch.weights is None else batch.weights.sum().item()
        assert total == dataset.loss_weight(rows)


def test_attention_of_bf16_documents_is_the_fp32_one_rounded() -> None:
    """On a CPU each document is computed in fp32; output and gradients are rounded to bf16 once."""
    torch.manual_seed(0)
    lengths = [3, 1, 40]
    q, k, v = (torch.randn(44, 2, 8).bfloat16().requires_grad_() for _ in range(3))
    y = Documents(lengths, torch.tensor([0, 3, 4, 44], dtype=torch.int32), 40).layer(0).attend(q, k, v, 0.0)
    for part in (slice(0, 3), slice(3, 4), slice(4, 44)):
        want = Rows().attend(q[None, part].float(), k[None, part].float(), v[None, part].float(), 0.0)[0]
        assert y[part].equal(want.bfloat16())
    gradient = torch.randn_like(y)
    got = torch.autograd.grad(y, (q, k, v), gradient)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    parts = zip(*(x.split(lengths) for x in exact), strict=True)
    whole = torch.cat([Rows().attend(q[None], k[None], v[None], 0.0)[0] for q, k, v in parts])
    for mine, theirs in zip(got, torch.autograd.grad(whole, exact, gradient.float()), strict=True):
        assert mine.equal(theirs.bfloat16())


def test_split_evenly_by_hand() -> None:
    """The fewest groups that the limit permits, cut so that their sizes are most nearly equal."""
    rows = np.array([7, 3, 9, 1])

    def groups(lengths: list[int], limit: int) -> list[list[int]]:
        return [part.tolist() for part in split_evenly(rows, np.array(lengths), limit)]

    assert groups([10, 10, 10, 10], 40) == [[7, 3, 9, 1]]
    assert groups([10, 10, 10, 10], 39) == [[7, 3], [9, 1]]
    assert groups([10, 10, 10, 10], 1) == [[7], [3], [9], [1]]
    assert groups([30, 10, 10, 10], 30) == [[7], [3, 9, 1]]
    assert groups([1, 500, 1, 1], 100) in ([[7], [3], [9, 1]], [[7, 3], [9, 1]], [[7], [3, 9, 1]])
    assert list(split_evenly(rows[:0], np.array([], dtype=int), 40)) == []


@pytest.mark.parametrize("limit", [1, 50, 200, 800, 100_000])
def test_split_evenly_keeps_order_and_every_row(limit: int) -> None:
    """Every row occurs once and in order; group sizes differ by about one row; no group is empty."""
    rng = np.random.default_rng(0)
    rows, lengths = rng.permutation(60), rng.integers(1, 90, 60)
    length_of = dict(zip(rows.tolist(), lengths.tolist(), strict=True))
    groups = list(split_evenly(rows, lengths, limit))
    assert np.concatenate(groups).tolist() == rows.tolist()
    assert all(len(group) for group in groups)
    wanted = -(-int(lengths.sum()) // limit)
    assert len(groups) <= wanted
    if limit >= lengths.max():
        assert len(groups) == wanted
    sizes = [sum(length_of[row] for row in group.tolist()) for group in groups]
    average = lengths.sum() / wanted
    assert all(abs(size - average) <= lengths.max() for size in sizes)


def test_single_long_row_is_a_group() -> None:
    """A row longer than the limit is neither cut nor dropped."""
    assert [part.tolist() for part in split_evenly(np.array([5]), np.array([900]), 100)] == [[5]]


@pytest.mark.parametrize(("items", "parts"), [(128, 4), (7, 3), (2, 4), (0, 2), (5, 1)])
def test_dealt_parts_cost_about_the_same(items: int, parts: int) -> None:
    """Every item is in one part, each part is ascending, and no part costs more than another by more than an item."""
    costs = np.random.default_rng(items).integers(1, 500, items)
    dealt = deal(costs, parts)
    assert len(dealt) == parts
    assert sorted(np.concatenate(dealt).tolist()) == list(range(items))
    assert all((np.diff(part) > 0).all() for part in dealt)
    loads = [int(costs[part].sum()) for part in dealt]
    assert max(loads) - min(loads) <= costs.max(initial=0)
    if items == 128:
        assert max(loads) < 1.01 * sum(loads) / parts


def test_deal_breaks_ties_by_order() -> None:
    """Equal costs go to the parts in turn."""
    assert [part.tolist() for part in deal(np.array([3, 3, 3, 3, 3]), 2)] == [[0, 2, 4], [1, 3]]
    assert [part.tolist() for part in deal(np.array([1, 9, 2, 7]), 2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_target_counts_are_those_of_packs(token_dir: Path, weight: float) -> None:
    """For each row, and for rows cut to their prompt or to one token."""
    dataset = CodeAlpacaDataset(token_dir, "train", prompt_loss_weight=weight)
    dataset.lengths = dataset.lengths.copy()
    dataset.lengths[3] = dataset.lengths[3, 1]
    dataset.lengths[5] = 1
    rows = np.arange(len(dataset))
    counts = dataset.target_counts(rows)
    packs = [pack(dataset, rows[i : i + 1], torch.device("cpu")) for i in rows]
    assert counts.tolist() == [len(batch.targets) for batch in packs]
    assert dataset.with_targets(rows).tolist() == [row for batch in packs for row in batch.rows.tolist()]
    assert counts[5] == 0
