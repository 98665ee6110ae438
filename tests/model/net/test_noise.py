"""The noise of dropout: known answers of the generators, rate and independence, and no dependence on the packing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from model.net.noise import FIRST_HEAD, Noise, philox_2x32, philox_4x32

ONES = 0xFFFFFFFF


def words(*numbers: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(number) for number in numbers)


def noise_of(rows: list[int], length: int, rate: float = 0.1, seed: int = 7, step: int = 3) -> Noise:
    """Noise for rows of one length."""
    tokens = [(row << 32) + position for row in rows for position in range(length)]
    return Noise(rate, torch.tensor([seed, step]), torch.tensor(tokens))


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "want"),
    [
        ((0, 0, 0, 0), (0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            10,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
        ((0, 0), (0,), 7, (0x257A3673, 0xCD26BE2A)),
        ((0, 0), (0,), 10, (0xFF1DAE59, 0x6CD10DF2)),
        ((ONES, ONES), (ONES,), 10, (0x2C3F628B, 0xAB4FD7AD)),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], rounds: int, want: tuple[int, ...]) -> None:
    """The test vectors of Random123, the authors' library."""
    if len(counter) == 4:
        got = philox_4x32(words(*counter), words(*key), rounds)  # type: ignore[arg-type]
    else:
        got = philox_2x32(words(*counter), *words(*key), rounds)  # type: ignore[arg-type, assignment]
    assert tuple(int(word) for word in got) == want


def test_a_token_has_its_noise_wherever_it_stands() -> None:
    """Rows in another order, other rows beside them, or a part of a row: the same masks bit for bit."""
    whole = noise_of([5, 2, 9], 11)
    masks = whole.kept(whole.keys(1, 2), 40).unflatten(1, (3, 11))  # (streams, row, position, element)
    other = noise_of([9, 70_000, 5], 11)
    got = other.kept(other.keys(1, 2), 40).unflatten(1, (3, 11))
    assert torch.equal(got[:, 0], masks[:, 2])
    assert torch.equal(got[:, 2], masks[:, 0])
    assert not torch.equal(got[:, 1], masks[:, 1])
    assert torch.equal(other.kept(other.keys(1, 2), 17).unflatten(1, (3, 11))[:, 2], masks[:, 0, :, :17])


def test_number_of_heads_changes_no_stream() -> None:
    """The residual branches have their streams before those of the heads."""
    noise = noise_of([1], 5)
    assert torch.equal(noise.keys(3, 0), noise.keys(3, 12)[:FIRST_HEAD])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate(rate: float) -> None:
    """The share that is dropped lies within five standard errors, and what is kept is scaled up by it."""
    noise = noise_of(list(range(40)), 50, rate)
    x = torch.ones(2000, 512, dtype=torch.float64)
    y = noise.drop(x, noise.keys(0, 0)[0])
    error = math.sqrt(rate * (1 - rate) / x.numel())
    assert abs((y == 0).double().mean() - rate) < 5 * error
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-8)
    assert abs(y.mean() - 1) < 5 * error / (1 - rate)


def bits(seed: int = 7, step: int = 3, row: int = 4, layer: int = 2, stream: int = 0) -> Tensor:
    """What is dropped of 200 positions x 256 elements, at a rate of a half."""
    noise = noise_of([row], 200, 0.5, seed, step)
    return noise.kept(noise.keys(layer, 4)[stream], 256)


def chi_square(a: Tensor, b: Tensor) -> float:
    """Of the 2 x 2 table of two masks, against independence at a rate of a half; 3 degrees of freedom."""
    counts = torch.bincount((2 * a + b.long()).flatten(), minlength=4).double()
    return float(((counts - a.numel() / 4) ** 2 / (a.numel() / 4)).sum())


def test_masks_are_independent() -> None:
    """Seeds, steps, rows, layers and streams: all pairs by chi-square, and the sum over pairs too."""
    masks = [bits()]
    for name in ("seed", "step", "row", "layer", "stream"):
        base = {"seed": 7, "step": 3, "row": 4, "layer": 2, "stream": 0}[name]
        masks += [bits(**{name: base + 1}), bits(**{name: base + 2})]
    found = [chi_square(a, b) for a, b in itertools.combinations(masks, 2)]
    assert len(found) == 55
    assert max(found) < 22.0  # exceeded once in 13,000 draws, so with 55 pairs once in 240 seeds
    assert sum(found) / len(found) == pytest.approx(3, abs=1.5)


def test_neighbours_are_independent() -> None:
    """Shifted by some positions or elements, a mask looks like another one."""
    mask = bits()
    for shift in (1, 2, 3, 8, 32, 64, 128):
        assert chi_square(mask[shift:], mask[:-shift]) < 22.0
        assert chi_square(mask[:, shift:], mask[:, :-shift]) < 22.0
    square = bits(stream=FIRST_HEAD)[:200, :200]
    upper = torch.triu_indices(200, 200, 1)
    assert chi_square(square[upper[0], upper[1]], square[upper[1], upper[0]]) < 22.0


def test_large_numbers() -> None:
    """Seed, step and row up to their bounds give different noise, and no error."""
    found = {
        tuple(noise_of([row], 2, 0.5, seed, step).keys(63, 25).flatten().tolist())
        for seed in (0, 2**32 - 1)
        for step in (0, 10**8 - 1)
        for row in (0, 2**31 - 1)
    }
    assert len(found) == 8
