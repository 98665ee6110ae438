"""How many slots a GPU gets, and which texts share a pass; what needs a GPU is in test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from model import GPTConfig, GPTModel
from model.generation import fused
from model.generation.fused import _parts, can_decode, fitting_slots

CONFIG = GPTConfig.preset("355m")
PLACE = 2 * 24 * 1024 * 2  # bytes of a token's keys and values in bf16
LOGITS = 12 * 50257


@pytest.mark.parametrize(
    ("needs", "memory", "slots"),
    [
        ([], 10**9, 0),
        ([200] * 5, 10**12, 5),
        ([200] * 5000, 10**12, 2048),
        ([400, 200, 100], 600 * PLACE + 2 * LOGITS, 2),
        ([400, 200, 100], 600 * PLACE + 2 * LOGITS - 1, 1),
        ([400, 200, 100], 0, 1),
    ],
)
def test_slots_follow_from_rows_and_memory(needs: list[int], memory: int, slots: int) -> None:
    """The rows that need most must fit at a time; one row is always tried."""
    assert fitting_slots(CONFIG, needs, 2, memory) == slots


def test_texts_are_cut_into_passes() -> None:
    """None is lost, and none is longer than it must be."""
    lengths = [5, 4, 3, 30, 2, 2]
    assert [lengths[part] for part in _parts(lengths, 9)] == [[5, 4], [3], [30], [2, 2]]
    assert list(_parts([], 9)) == []


def test_a_layer_of_another_type_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused network reads weights and never calls layers, so it must not serve a model with an adapter."""

    class Adapter(torch.nn.Linear):
        pass

    monkeypatch.setattr(fused, "has_kernels", lambda *args: True)
    model = GPTModel(GPTConfig(20, 8, 16, 1, 1))
    assert can_decode(model, torch.float32)
    model.h[0].mlp.c_fc = Adapter(16, 64)
    assert not can_decode(model, torch.float32)
    model = GPTModel(GPTConfig(20, 8, 16, 1, 1))
    model.lm_head = Adapter(16, 20, bias=False)
    assert not can_decode(model, torch.float32)
