"""Attention of packed documents in groups: the same as document by document, with and without dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.net.attention import Documents, Groups, Rows
from model.net.noise import FIRST_HEAD, Noise

LENGTHS = [3, 40, 1, 17, 38, 2, 41, 1]


def documents_of(lengths: list[int], noise: Noise | None = None) -> Documents:
    sizes = torch.tensor(lengths)
    ends = torch.repeat_interleave(sizes.cumsum(0), sizes).int()
    begins = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).int()
    return Documents(lengths, begins, ends, noise)


def heads(count: int) -> list[Tensor]:
    """q, k, v (count, 2 heads, 8)."""
    torch.manual_seed(0)
    return [torch.randn(count, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_groups_hold_every_token_once(lengths: list[int]) -> None:
    """A group's rows are documents from their first token on; at most an eighth of the places is padding."""
    groups = Groups(lengths, torch.device("cpu"))
    tokens = torch.arange(1, sum(lengths) + 1.0)
    rows = [row for group in groups.spread(tokens) for row in group]
    documents = {int(part[0]): part for part in tokens.split(lengths)}
    assert len(rows) == len(lengths)
    for row in rows:
        document = documents.pop(int(row[0]))
        assert torch.equal(row[: len(document)], document)
        assert not row[len(document) :].any()
    assert torch.equal(groups.gather(groups.spread(tokens)), tokens)
    for rows_of_group, group in zip(groups.shapes, groups.spread(tokens), strict=True):
        assert 8 * int((group == 0).sum()) <= rows_of_group[0] * rows_of_group[1]


def test_groups_equal_documents_one_by_one() -> None:
    """Output and gradients, to rounding."""
    q, k, v = heads(sum(LENGTHS))
    got = documents_of(LENGTHS).layer(0).attend(q, k, v, 0.0)
    parts = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    want = torch.cat([Rows().attend(a[None], b[None], c[None], 0.0)[0] for a, b, c in parts])
    upstream = torch.randn_like(want)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def noise_for(rows: list[int], lengths: list[int]) -> Noise:
    names = np.repeat(np.array(rows) << 32, lengths) + np.concatenate([np.arange(n) for n in lengths])
    return Noise(0.3, torch.tensor([5, 9]), torch.from_numpy(names))


def test_dropout_of_weights_is_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax, mask by hand, product with the values: for each document and head, whatever the groups."""
    monkeypatch.setattr("model.net.attention._WEIGHTS", 4000)  # a group is computed in several parts
    rows = list(range(len(LENGTHS)))
    noise = noise_for(rows, LENGTHS)
    q, k, v = heads(sum(LENGTHS))
    got = documents_of(LENGTHS, noise).layer(4).attend(q, k, v, 0.3)
    begin, dropped = 0, 0
    for row, length in zip(rows, LENGTHS, strict=True):
        part = slice(begin, begin + length)
        own = noise_for([row], [length])
        for head in range(2):
            mask = own.kept(own.keys(4, 2)[FIRST_HEAD + head], length).tril()
            scores = (q[part, head] @ k[part, head].T / 8**0.5).exp().tril()
            weights = scores / scores.sum(1, keepdim=True) * mask * own.scale
            torch.testing.assert_close(got[part, head], weights @ v[part, head], rtol=1e-10, atol=1e-12)
            dropped += int((~mask).tril().sum())
        begin += length
    assert dropped > 300


def test_dropout_needs_a_source_of_noise() -> None:
    """Packed documents never draw from torch's global generator."""
    q, k, v = heads(3)
    for call in (
        lambda layer: layer.attend(q, k, v, 0.1),
        lambda layer: layer.drop(q.flatten(1), 0, 0.1),
    ):
        with pytest.raises(ValueError, match="need a source of noise"):
            call(documents_of([3]).layer(0))
