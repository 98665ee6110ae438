"""The draw of a token: its distribution, and which tokens can be drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import filter_logits
from model.generation import drawing
from model.generation.drawing import Sampler, invert
from model.generation.streams import stream_keys, uniforms

CPU = torch.device("cpu")
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.7},
]


def sampler(vocab_size: int, never: Any = (), penalty: float = 1.0, **settings: Any) -> Sampler:
    wanted = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    return Sampler(**wanted, repetition_penalty=penalty, vocab_size=vocab_size, never=never, device=CPU)


def reference(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """The probabilities (V,) in float64, by a loop over the sorted tokens."""
    scaled = logits.double() / settings["temperature"]
    order = sorted(range(len(scaled)), key=lambda token: -float(scaled[token]))
    order = order[: settings.get("top_k") or len(order)]
    weights = torch.tensor([float(scaled[token]) for token in order], dtype=torch.float64).softmax(0)
    kept, mass = [], 0.0
    for token, weight in zip(order, weights.tolist(), strict=True):
        if mass >= settings.get("top_p", 2.0):
            break
        kept.append((token, weight))
        mass += weight
    found = torch.zeros(len(logits), dtype=torch.float64)
    for token, weight in kept:
        found[token] = weight / mass
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_agree_with_a_reference_in_float64(settings: dict[str, Any]) -> None:
    """Chi-square over 40,000 draws of three rows, by the random numbers of generation; nothing else is drawn."""
    draws, vocabulary = 40_000, 12
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(4)) * 1.5
    draw = sampler(vocabulary, **settings)
    numbers = uniforms(torch.tensor(stream_keys([[1], [2], [3]])), 11, 0, draws)
    for row in range(3):
        drawn = draw(logits[row].expand(draws, -1).clone(), numbers[row], None)
        counts = torch.bincount(drawn, minlength=vocabulary).double()
        want = reference(logits[row], settings) * draws
        kept = want > 0
        assert counts[~kept].sum() == 0
        statistic = float(((counts - want)[kept] ** 2 / want[kept]).sum())
        freedom = int(kept.sum()) - 1
        # The quantile 0.9999 of chi-square, by Wilson and Hilferty's cube root approximation.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3 if freedom else 1e-9
        assert statistic < limit, (row, statistic, limit)


@pytest.mark.parametrize("nucleus", [4, 1024])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_can_be_drawn_is_what_the_filters_keep(
    settings: dict[str, Any], nucleus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 997 equally spaced numbers; also where the first tokens that are sorted do not reach p."""
    monkeypatch.setattr(drawing, "_NUCLEUS", nucleus)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 2
    draw = sampler(40, **settings)
    want = filter_logits(logits, **settings).softmax(-1)
    for row in range(5):
        drawn = draw(logits[row].expand(9970, -1).clone(), torch.arange(9970) / 9970, None)
        shares = torch.bincount(drawn, minlength=40) / 9970
        torch.testing.assert_close(shares, want[row], atol=2e-4, rtol=0)


@pytest.mark.parametrize("never", [[39, 38], [0], [3, 39, 17], range(1, 40)])
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.0}], ids=str)
def test_ids_that_are_excluded_are_not_drawn(settings: dict[str, Any], never: Any) -> None:
    """At the end of the vocabulary or within it; columns beyond it neither."""
    logits = torch.zeros(2000, 44)
    logits[:, list(never)] = 9.0
    logits[:, 40:] = 99.0
    drawn = sampler(40, never, **settings)(logits, torch.arange(2000) / 2000, None)
    assert not set(drawn.tolist()) & {*never, 40, 41, 42, 43}


def test_excluding_all_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="never holds all 5 ids"):
        sampler(5, range(5))


def test_the_largest_number_draws_a_token_that_is_kept() -> None:
    """Tokens of probability 0 are not drawn, wherever they stand. 1 stands for a sum that is rounded up."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(2))
    logits[:, 500:] = float("-inf")
    logits[:, :3] = float("-inf")
    for number, first in ((1 - 2**-24, False), (1.0, False), (0.0, True)):
        drawn = invert(logits, torch.full((64,), number))
        assert logits.gather(1, drawn[:, None]).isfinite().all()
        assert (drawn == 3).all() == first


def test_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    """A token that was seen falls behind; one that was not keeps its logit."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    seen = torch.tensor([[True, False, True, False]])
    draw = sampler(4, penalty=2.0, temperature=0)
    assert draw(logits.clone(), torch.zeros(1), seen).item() == 1
    assert draw(logits[:, 2:].clone(), torch.zeros(1), seen[:, 2:]).item() == 1
