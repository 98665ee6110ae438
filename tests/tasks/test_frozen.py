"""A base that several trainings use in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tasks.frozen as module
from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import plan_freeze
from model.net.layout import CONFIG_FILE
from model.net.loading import hash_pretrained
from model.net.tokenizer import hash_tokenizer
from tasks.frozen import ReusableBase, load_frozen
from tasks.load_weights import check_weights
from tasks.references import ModelRef, WeightsRef


@pytest.fixture
def reference(base: Path) -> ModelRef:
    """The embedded base, as a directory of a user's own."""
    _, files = hash_pretrained(base)
    return check_weights(WeightsRef("own", None, str(base), files, str(base), hash_tokenizer(base)), "tiny")


def test_each_training_gets_the_base_as_it_was_loaded(
    base: Path, reference: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, without gradients, and loaded once; again only where other blocks train or in another dtype."""
    loads: list[tuple[object, ...]] = []

    def counted(*arguments: object) -> object:
        loads.append(arguments)
        return load_frozen(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_frozen", counted)
    shape = GPTConfig.from_json(base / CONFIG_FILE)
    plan = plan_freeze(shape, FreezeConfig(num_unfrozen_layers=2))
    fresh = load_frozen(reference, plan, torch.device("cpu"), torch.float32)
    reusable = ReusableBase(torch.device("cpu"))
    for _ in range(3):
        network = reusable.get(reference, plan, torch.float32)
        assert not network.training
        for (name, own), expected in zip(network.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(own, expected), name
            assert own.requires_grad == expected.requires_grad
            assert own.grad is None
            if own.requires_grad:  # what a training leaves behind
                own.data.mul_(1.5)
                own.grad = torch.ones_like(own)
        network.train()
    assert len(loads) == 1
    other = plan_freeze(shape, FreezeConfig(num_unfrozen_layers=1))
    assert reusable.get(reference, other, torch.float32).num_frozen == 5
    assert reusable.get(reference, other, torch.bfloat16).wte.weight.dtype == torch.bfloat16
    assert len(loads) == 3
    with pytest.raises(RuntimeError, match="other parameters would train than planned"):
        reusable.get(reference, replace(plan, names=plan.names[1:]), torch.float32)
