"""Digests of tensors, by which ranks find out that their parameters differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model.engine.ranks import Ranks

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes by size in bytes
_SLICE = 1 << 22  # elements at a time, to bound memory
_FACTOR = 0x2545F4914F6CDD1D  # odd (Steele & Vigna 2021)


class RanksDifferError(RuntimeError):
    """Parameters that must be equal on all ranks are not."""


def digests(tensors: Iterable[Tensor]) -> list[int]:
    """A 64-bit digest of each tensor's bits, computed on its device.

    It is the sum of all words, each multiplied by an odd number that depends on its place, modulo 2**64. So it is
    exact in any order of the sum, and a single word that differs always changes it.
    """
    found: list[Tensor] = []
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start in range(0, len(words), _SLICE):
            part = words[start : start + _SLICE].long()
            places = torch.arange(start, start + len(part), device=tensor.device)
            total += (part * ((2 * places + 1) * _FACTOR)).sum()
        found.append(total)
    return [int(digest) for digest in torch.stack(found).tolist()] if found else []


def check_equal(ranks: Ranks, tensors: Mapping[str, Tensor], when: str, dtype: torch.dtype | None = None) -> None:
    """Check that tensors have the same bits on all ranks.

    Args:
        tensors: by name, the same names on all ranks.
        when: what comes before, for the message: "at step 7".
        dtype: compare what tensors are when rounded to it; None compares them as they are.

    Raises:
        RanksDifferError: on all ranks; the message names those that differ from rank 0, and a tensor.
    """
    if ranks.world == 1:
        return
    first, *others = ranks.gather(digests(tensor.to(dtype or tensor.dtype) for tensor in tensors.values()))
    differing = {rank: its for rank, its in enumerate(others, 1) if its != first}
    if differing:
        names = [name for i, name in enumerate(tensors) if any(its[i] != first[i] for its in differing.values())]
        who = ", ".join(map(str, differing))
        raise RanksDifferError(
            f"the parameters of rank {who} differ from those of rank 0 {when} ({len(names)} tensors, first "
            f"{names[0]}): start the run again from its last checkpoint, and replace the GPU if it happens again"
        )
