"""Dropout noise from a counter-based generator: a function of seed, step, row, position, layer and place.

The noise of a token depends on no other token. It is the same, bit for bit, however rows are packed and split into
passes, after a resumption, and on a CPU and a GPU.

Two generators of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3") work in a chain. Philox4x32-10,
keyed by the seed, turns step, row, position and stream into the two words that are the token's key in this stream.
Philox2x32-7, keyed by them, turns the number of an element into 32 bits. An element is dropped if these bits, read as
a number, are below rate * 2**32. A layer has one stream for each place: the outputs of its two residual branches and
the attention weights of each head.

``model.engine.noise_kernels`` computes the same bits on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Streams of a layer: its residual branches, then the attention weights of its heads.
ATTENTION_BRANCH, MLP_BRANCH, FIRST_HEAD = 0, 1, 2

ROW_BITS = 32  # a token is named by its row's number, shifted by so many bits, plus its position in the row
ELEMENT_ROUNDS = 7  # the fewest that pass all tests of TestU01, by the authors' table
_WORD = 0xFFFFFFFF
_MULTIPLIER_2X32 = 0xD256D193
_MULTIPLIERS_4X32 = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85


@dataclass(eq=False)
class Noise:
    """Source of the noise of one pass over packed documents.

    Attributes:
        rate: share of the elements that are dropped, in [0, 1).
        origin: seed and optimizer step, (2,), int64, on the device.
        tokens: row and position of each token: row * 2**32 + position, (N,), int64, on the device.
    """

    rate: float
    origin: Tensor
    tokens: Tensor

    @property
    def threshold(self) -> int:
        """Elements whose bits are below it are dropped."""
        return round(self.rate * 2**32)

    @property
    def scale(self) -> float:
        """Factor of the elements that are kept: their expectation stays the same."""
        return 1 / (1 - self.threshold / 2**32)

    def keys(self, layer: int, heads: int) -> Tensor:
        """Keys of all tokens in all streams of a layer, (heads + 2, 2, N), int64 below 2**32."""
        streams = torch.arange(heads + FIRST_HEAD, device=self.tokens.device) + stream_of(layer)
        row, position = self.tokens >> ROW_BITS, self.tokens & _WORD
        counter = (position, row, streams[:, None], self.origin[1])
        words = philox_4x32(counter, (self.origin[0] & _WORD, self.origin[0] >> 32))
        return torch.stack(words[:2], 1)

    def kept(self, keys: Tensor, elements: int) -> Tensor:
        """Which elements are kept.

        Args:
            keys: of one or more streams, (..., 2, N).
            elements: E, elements of a token in a stream.

        Returns:
            (..., N, E), bool.
        """
        key, first = keys.unbind(-2)
        numbers = torch.arange(elements, device=keys.device)
        return philox_2x32((numbers, first[..., None]), key[..., None])[0] >= self.threshold

    def drop(self, x: Tensor, keys: Tensor) -> Tensor:
        """Dropout of x (..., N, E), by keys (..., 2, N)."""
        return torch.where(self.kept(keys, x.size(-1)), x * self.scale, 0)


def stream_of(layer: int) -> int:
    """Number of a layer's first stream."""
    return layer << 16


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words from a counter of four words and a key of two; all int64 below 2**32, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS_4X32[0])
        high_1, low_1 = _multiply(c2, _MULTIPLIERS_4X32[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[return-value]


def philox_2x32(counter: tuple[Tensor, Tensor], key: Tensor, rounds: int = ELEMENT_ROUNDS) -> tuple[Tensor, Tensor]:
    """Two random words from a counter of two words and a key of one; all int64 below 2**32, broadcast."""
    c0, c1 = counter
    for _ in range(rounds):
        high, low = _multiply(c0, _MULTIPLIER_2X32)
        c0, c1 = high ^ key ^ c1, low
        key = (key + _INCREMENTS[0]) & _WORD
    return c0, c1


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Higher and lower word of a product. int64 holds its 64 bits, whatever their sign."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD
