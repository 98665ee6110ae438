"""Random streams of rows."""

from __future__ import annotations

import torch

from model.generation.streams import stream_keys, uniforms


def test_a_stream_is_that_of_philox() -> None:
    """A known answer of Random123 (kat_vectors, philox4x32 10): all words zero give 6627e8d5 first."""
    assert uniforms(torch.zeros(1, 3, dtype=torch.long), 0, 0, 1).item() == (0x6627E8D5 >> 8) * 2**-24


def test_a_stream_can_begin_anywhere() -> None:
    """Number n is the same in any block, and streams do not depend on the others of the call."""
    keys = torch.tensor(stream_keys([[5, 6], [7], [5, 6]]))
    numbers = uniforms(keys, 3, 0, 100)
    assert torch.equal(uniforms(keys[1:], 3, 40, 20), numbers[1:, 40:60])
    assert numbers.min() >= 0
    assert numbers.max() < 1


def test_streams_differ_by_prompt_occurrence_and_seed() -> None:
    """No two of them share a number at the same place, nor one moved by a place."""
    keys = torch.tensor(stream_keys([[5, 6], [6, 5], [5, 6], [5, 6, 0]]))
    numbers = torch.cat([uniforms(keys, seed, 0, 50) for seed in (0, 1, 2**32)])
    assert len(numbers.unique()) == numbers.numel()


def test_numbers_are_uniform() -> None:
    """Chi-square of 64 bins over a million numbers of a thousand streams (63 degrees: 0.9999 is below 120)."""
    numbers = uniforms(torch.tensor(stream_keys([[n] for n in range(1000)])), 7, 0, 1000)
    counts = torch.bincount((numbers.flatten() * 64).long(), minlength=64).double()
    assert float(((counts - 15625) ** 2 / 15625).sum()) < 120
