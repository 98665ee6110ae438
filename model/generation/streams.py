"""The random numbers of each row, from a counter-based generator.

A row's stream is keyed by what it is, and not by where it stands: a hash of its prompt's ids, the number of earlier
rows of the call that have the same prompt, and the seed. Number n of the stream draws the row's n-th new token.
Philox4x32-10 (Salmon et al. 2011) makes the numbers from integers alone, so they are the same on a CPU and a GPU.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.net.noise import philox_4x32

_WORD = 0xFFFFFFFF


def stream_keys(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """For each prompt two words of its hash, and the number of equal prompts before it."""
    seen: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(np.array(prompt, dtype="<i8").tobytes(), digest_size=8).digest()
        keys.append((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"), seen[digest]))
        seen[digest] += 1
    return keys


def uniforms(keys: Tensor, seed: int, first: int, count: int) -> Tensor:
    """Numbers ``first`` to ``first + count`` of each stream.

    Args:
        keys: of ``stream_keys``, (B, 3), int64.

    Returns:
        (B, count), float32: multiples of 2**-24 in [0, 1).
    """
    steps = torch.arange(first, first + count, device=keys.device)
    seeds = torch.tensor([seed & _WORD, seed >> 32 & _WORD], device=keys.device)
    low, high, occurrence = (each[:, None] for each in keys.unbind(1))
    word, *_ = philox_4x32((steps, occurrence, seeds[0], seeds[1]), (low, high))
    return (word >> 8).float() * 2**-24
