"""Sampling filters: temperature, top-k and top-p (nucleus); ``model.generation`` draws with them.

A sampling filter is one function that checks its setting and returns the filter, and its line in ``build_filters``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Callable[[Tensor], Tensor]
"""Logits (B, V) in float32 -> logits (B, V) with removed tokens at -inf; the argument is not changed."""


LARGEST_TEMPERATURE = 1e6  # all tokens are equally probable long before
LARGEST_PENALTY = 1e6  # no token comes twice long before; a logit times 1e300 is infinite


def scale(temperature: float) -> Filter:
    """Divide by a temperature above 0; the result may be shifted by a constant, which changes no probability."""
    if not temperature >= 0:
        raise ValueError(
            f"temperature {temperature} is not a number of 0 or more: 0 is greedy, 1 leaves the model as it is"
        )
    if temperature > LARGEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature} is more than {LARGEST_TEMPERATURE:g}: 1 leaves the model as it is"
        )

    def apply(logits: Tensor) -> Tensor:
        if temperature == 1:
            return logits
        # Less the largest logit: however low the temperature, that one stays finite.
        return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)

    return apply


def keep_top_k(k: int) -> Filter:
    """Keep the k most probable tokens: exactly k where logits tie, all where k is larger than V."""
    if k < 1:
        raise ValueError(f"top_k {k} keeps no token: leave it out to keep all")

    def apply(logits: Tensor) -> Tensor:
        if k >= logits.size(-1):
            return logits
        values, indices = torch.topk(logits, k, dim=-1)
        return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)

    return apply


def keep_top_p(p: float) -> Filter:
    """Keep the nucleus of mass p: the smallest set of most probable tokens whose mass reaches p.

    The token that crosses p belongs to it, and the most probable one is always kept (Holtzman et al. 2020,
    section 3.1).
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p {p} is not in (0, 1]")

    def apply(logits: Tensor) -> Tensor:
        if p == 1:
            return logits
        ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        probabilities = F.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ahead of each
        removed = before >= p
        removed[..., 0] = False
        return logits.masked_fill(torch.zeros_like(removed).scatter(-1, indices, removed), float("-inf"))

    return apply


def build_filters(temperature: float, top_k: int | None, top_p: float | None) -> list[Filter]:
    """The filters of the settings, in the order in which they are applied; at temperature 0 the best token is left.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """
    filters = [scale(temperature)]
    if top_k is not None:
        filters.append(keep_top_k(top_k))
    if top_p is not None:
        filters.append(keep_top_p(top_p))
    return [keep_top_k(1)] if temperature == 0 else filters


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float = 1.0
) -> None:
    """Raise ValueError, naming the setting, unless the settings can be sampled with."""
    build_filters(temperature, top_k, top_p)
    if not 1 / LARGEST_PENALTY <= repetition_penalty <= LARGEST_PENALTY:
        raise ValueError(
            f"repetition_penalty {repetition_penalty} is not between {1 / LARGEST_PENALTY:g} and "
            f"{LARGEST_PENALTY:g}: 1 leaves the model as it is"
        )


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scale by temperature, then keep the top k tokens, then the nucleus of mass p.

    Args:
        logits: (B, V), any floating dtype.
        temperature: 0 keeps the most probable token alone.
        top_k: tokens to keep, as keep_top_k; None keeps all.
        top_p: probability mass to keep, in (0, 1], as keep_top_p; None keeps all.

    Returns:
        (B, V) in float32, logits / temperature except for a shift that changes no probability, with removed tokens
        at -inf; the argument is not changed.

    Raises:
        ValueError: a setting is out of range.
    """
    logits = logits.float()
    for each in build_filters(temperature, top_k, top_p):
        logits = each(logits)
    return logits


def crop(text: Sequence[int], length: int, head: int = 0) -> list[int]:
    """At most ``length`` tokens of a text: its first ``head`` ones, and its last ones."""
    if len(text) <= length:
        return list(text)
    return [*text[:head], *text[len(text) - (length - head) :]]
