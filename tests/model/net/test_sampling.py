"""Temperature, top-k and top-p."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model import GPTModel, filter_logits, generate
from model.generation.drawing import Sampler
from model.net.sampling import build_filters, check_sampling


def logits_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_top_p_keeps_the_token_that_crosses() -> None:
    """0.5 + 0.3 crosses 0.6, so both stay; the original script kept one."""
    assert kept(filter_logits(logits_of([0.5, 0.3, 0.2]), top_p=0.6)) == [[0, 1]]


@pytest.mark.parametrize(
    ("p", "want"), [(0.05, [2]), (0.39, [2]), (0.41, [0, 2]), (0.69, [0, 2]), (0.71, [0, 2, 3]), (0.95, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, want: list[int]) -> None:
    """Not one token more or less, in any order of the vocabulary."""
    assert kept(filter_logits(logits_of([0.3, 0.1, 0.4, 0.2]), top_p=p)) == [want]


def test_first_token_above_p_is_kept_alone() -> None:
    """The original script removed every token, and multinomial failed."""
    filtered = filter_logits(logits_of([0.05, 0.9, 0.05]), top_p=0.5)
    assert kept(filtered) == [[1]]
    assert torch.multinomial(filtered.softmax(-1), 1).item() == 1


def test_top_p_of_one_keeps_all() -> None:
    """No token is lost to the rounding of the cumulated sum."""
    assert kept(filter_logits(torch.randn(3, 1000), top_p=1.0)) == [list(range(1000))] * 3


def test_rows_are_filtered_independently() -> None:
    """Guards against indexing with logits[0, ...], which filters the first row with the other rows' indices."""
    rows = logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.36, 0.34])
    assert kept(filter_logits(rows, top_p=0.6)) == [[0, 1], [2], [1, 2]]
    assert kept(filter_logits(rows, top_k=1)) == [[0], [2], [1]]
    torch.manual_seed(0)
    many = torch.randn(7, 50)
    together = filter_logits(many, 0.8, 20, 0.7)
    for i in range(7):
        assert torch.equal(together[i : i + 1], filter_logits(many[i : i + 1], 0.8, 20, 0.7))


def test_temperature_divides() -> None:
    """0.5 sharpens: probabilities are squared and normalised."""
    got = filter_logits(logits_of([0.6, 0.3, 0.1]), temperature=0.5).softmax(-1)
    torch.testing.assert_close(got, torch.tensor([[0.36, 0.09, 0.01]]) / 0.46)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_any_low_temperature_is_nearly_argmax(temperature: float) -> None:
    """Also where the division overflows in fp32: the most probable tokens share all of the mass."""
    got = filter_logits(torch.tensor([[50.0, 80.0, 80.0], [-70.0, -80.0, -90.0]]), temperature, top_p=0.9)
    assert got.softmax(-1).tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]


def test_temperature_zero_is_argmax() -> None:
    """T = 0 keeps the most probable token, whatever else is set, and does not divide by zero."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.1}):
        filtered = filter_logits(logits, temperature=0.0, **settings)
        assert kept(filtered) == [[1], [0]]
        assert not filtered.isnan().any()


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    """torch.topk fails with k > V; the filter keeps all tokens."""
    logits = torch.randn(2, 5)
    assert torch.equal(filter_logits(logits, top_k=6), logits)
    assert torch.equal(filter_logits(logits, top_k=5), logits)


def test_ties_keep_exactly_k() -> None:
    """Guards against a comparison with the k-th logit, which keeps every token that ties with it."""
    assert [len(row) for row in kept(filter_logits(torch.zeros(3, 10), top_k=4))] == [4, 4, 4]


def test_order_is_temperature_then_top_k_then_top_p() -> None:
    """The nucleus is taken from the tempered, renormalised top k."""
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    # Top 2 renormalised: 0.57, 0.43, so 0.5 keeps one; of all four it would keep two.
    assert kept(filter_logits(logits, top_k=2, top_p=0.5)) == [[0]]
    assert kept(filter_logits(logits, top_p=0.5)) == [[0, 1]]
    # At T = 0.5 the shares are 0.53, 0.30, 0.13, 0.03: 0.5 keeps one.
    assert kept(filter_logits(logits, temperature=0.5, top_p=0.5)) == [[0]]
    # At T = 4 they are 0.29, 0.27, 0.24, 0.20: 0.7 keeps three, where T = 1 keeps two.
    assert kept(filter_logits(logits, temperature=4.0, top_p=0.69)) == [[0, 1, 2]]


def test_bf16_is_filtered_in_fp32() -> None:
    """A cumulative sum in bf16 is too coarse near 1: it would miscount a tail of 512 equal tokens."""
    logits = torch.zeros(2, 512, dtype=torch.bfloat16)
    filtered = filter_logits(logits, top_p=0.7)
    assert filtered.dtype == torch.float32
    assert {len(row) for row in kept(filtered)} <= {358, 359, 360}  # 0.7 * 512 = 358.4


def test_argument_is_not_changed() -> None:
    """The caller's logits keep their values."""
    logits = torch.randn(2, 8)
    before = logits.clone()
    filter_logits(logits, 0.7, 3, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": 1e300}, "temperature 1e\\+300"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": -5}, "top_k -5"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_p": math.nan}, "top_p nan"),
    ],
)
def test_bad_setting_is_refused_by_name(tiny_model: GPTModel, settings: dict[str, Any], name: str) -> None:
    """A setting that keeps nothing fails before anything is computed, in generate too."""
    with pytest.raises(ValueError, match=name):
        filter_logits(torch.zeros(1, 4), **settings)
    with pytest.raises(ValueError, match=name):
        generate(tiny_model, [[1]], 0, **settings)


@pytest.mark.parametrize("function", [filter_logits, generate, check_sampling, Sampler])
def test_every_filter_can_be_set_everywhere(function: Callable[..., Any]) -> None:
    """A filter that is added to build_filters is a setting of every function that samples, off by default."""
    settings = inspect.signature(function).parameters
    for name in inspect.signature(build_filters).parameters:
        assert name in settings
        if function not in (check_sampling, Sampler):
            assert settings[name].default == (1.0 if name == "temperature" else None)
