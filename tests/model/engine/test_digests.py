"""Digests of tensors: equal for equal bits, different after any change of a word."""

from __future__ import annotations

import pytest
import torch

from model.engine.digests import _SLICE, digests


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_every_change_is_seen(dtype: torch.dtype) -> None:
    """The last bit of one element, two elements exchanged, and a sign of zero."""
    torch.manual_seed(0)
    tensor = (100 * torch.rand(40, 5)).to(dtype)
    (want,) = digests([tensor])
    assert digests([tensor.clone(), tensor]) == [want, want]
    words = tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[dtype.itemsize])
    for row, column in ((0, 0), (17, 3), (39, 4)):
        words[row, column] ^= 1
        assert digests([tensor]) != [want]
        words[row, column] ^= 1
    assert digests([tensor]) == [want]
    assert digests([tensor.flip(0)]) != [want]
    if dtype.is_floating_point:
        zeros = torch.zeros(3, dtype=dtype)
        assert digests([zeros]) != digests([-zeros])


def test_slices_are_parts_of_one_digest() -> None:
    """A tensor of more than a slice: a change at its end is seen, and equal slices exchange nothing."""
    tensor = torch.zeros(_SLICE + 3, dtype=torch.float32)
    tensor[1] = 1.0
    (want,) = digests([tensor])
    moved = torch.zeros_like(tensor)
    moved[_SLICE + 1] = 1.0
    assert digests([moved]) != [want]
    assert digests([]) == []
