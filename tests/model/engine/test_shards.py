"""The parts that ranks update: they cover everything once, and together they are the whole update."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from model import GPTModel, freeze_bottom_layers
from model.engine.adamw import MOMENTS, AdamW, ParameterGroup
from model.engine.engine import Engine
from model.engine.ranks import Ranks
from model.engine.shards import Shards

SHAPES = [(3, 5), (40, 64), (64,), ()]


def build(parameters: list[torch.Tensor]) -> AdamW:
    """An optimizer of parameters with these values, two with weight decay and two without."""
    own = [nn.Parameter(parameter.clone()) for parameter in parameters]
    return AdamW([ParameterGroup(own[:2], 0.1), ParameterGroup(own[2:], 0.0)], 0.01)


def members(optimizer: AdamW) -> list[nn.Parameter]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.groups for parameter in group.parameters]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_parameters_and_gradients_are_views(world: int) -> None:
    """Values stay, backward passes add to the gradients, and zeros between them stay."""
    torch.manual_seed(0)
    values = [torch.randn(shape) for shape in SHAPES]
    optimizer = build(values)
    before = members(optimizer)
    shards = Shards(optimizer, Ranks(rank=1, world=world), torch.float32)
    assert shards.parameters.shape == shards.gradients.shape
    assert shards.gradients.numel() % (64 * world) == 0
    for parameter, same, value in zip(members(optimizer), before, values, strict=True):
        assert parameter is same
        assert torch.equal(parameter, value)
    assert shards.parameters.sum() == pytest.approx(sum(float(value.sum()) for value in values), abs=1e-3)
    for _ in range(2):
        torch.stack([(number * p).sum() for number, p in enumerate(before, 1)]).sum().backward()
    assert shards.gradients.sum() == 2 * (1 * 15 + 2 * 2560 + 3 * 64 + 4)
    for flat, tensors in ((shards.parameters, before), (shards.gradients, [p.grad for p in before])):
        assert all(t is not None and t.data_ptr() % 256 == flat.data_ptr() % 256 for t in tensors)
    shards.zero()
    assert not any(p.grad.any() for p in before if p.grad is not None)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("skips", [False, True], ids=["updated", "skipped"])
def test_parts_are_the_whole_update_bit_for_bit(world: int, skips: bool) -> None:
    """Each rank changes its part of parameters and moments only; the steps are counted on all of them."""
    torch.manual_seed(0)
    values, gradients = [[torch.randn(shape) for shape in SHAPES] for _ in "ab"]
    skip = torch.tensor(float(skips))
    whole = build(values)
    for parameter, gradient in zip(members(whole), gradients, strict=True):
        parameter.grad = gradient
    whole.step(skip)
    merged = {kind: [torch.zeros(shape) for shape in SHAPES] for kind in MOMENTS}
    updated = [value.clone() for value in values]
    for rank in range(world):
        optimizer = build(values)
        Shards(optimizer, Ranks(rank=rank, world=world), torch.float32)
        for parameter, gradient in zip(members(optimizer), gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        optimizer.step(skip)
        for number, parameter in enumerate(members(optimizer)):
            state = optimizer.state[parameter]
            assert state["step"] == 1 - skip
            for kind in MOMENTS:
                assert not (merged[kind][number] * state[kind]).any()  # no element is updated twice
                merged[kind][number] += state[kind]
            updated[number] = torch.where(parameter != values[number], parameter.detach(), updated[number])
    for number, parameter in enumerate(members(whole)):
        for kind in MOMENTS:
            assert torch.equal(merged[kind][number], whole.state[parameter][kind])
            assert bool(merged[kind][number].all()) is not skips
        assert torch.equal(updated[number], parameter)
        assert torch.equal(parameter, values[number]) is skips


@dataclass(frozen=True, eq=False)
class Recorder(Ranks):
    """Rank 1 of 3 whose exchange is a stand-in: it records dtypes, and the other ranks' parts are all 3.

    ``test_ranks.py`` has the real exchange.
    """

    rank: int = 1
    world: int = 3
    sent: list[torch.dtype] = field(default_factory=list)

    def gather_parts(self, flat: torch.Tensor) -> None:
        self.sent.append(flat.dtype)
        parts = flat.view(self.world, -1)
        parts[0], parts[2] = 3.0, 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_are_sent_in_the_dtype_of_passes(dtype: torch.dtype) -> None:
    """Own ones stay as they are, those of other ranks come rounded; a checkpoint gets all in float32."""
    torch.manual_seed(0)
    ranks = Recorder()
    optimizer = build([torch.randn(shape) for shape in SHAPES])
    shards = Shards(optimizer, ranks, dtype)
    shards.gather_state()
    assert ranks.sent == [], "nothing is updated yet"
    optimizer.step()
    parts = shards.parameters.view(3, -1)
    own = parts[1].clone()
    shards.gather_parameters()
    assert ranks.sent == [dtype]
    assert torch.equal(parts[1], own)
    assert (parts[1] != parts[1].to(torch.bfloat16)).double().mean() > 0.9
    assert (parts[0] == 3).all()
    assert (parts[2] == 3).all()
    shards.gather_state()
    exact = [] if dtype == torch.float32 else [torch.float32]
    assert ranks.sent[1:] == [*exact, torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("unfrozen", "train_head", "rounded"),
    [(0, False, True), (1, False, True), (3, False, True), (None, False, False), (1, True, False)],
)
def test_only_what_passes_cast_is_rounded(
    gpt2_dir: Path, unfrozen: int | None, train_head: bool, rounded: bool
) -> None:
    """Blocks and the final norm; nothing is where an embedding or the head trains."""
    model = GPTModel.from_pretrained(gpt2_dir)
    if unfrozen is not None:
        freeze_bottom_layers(model, unfrozen, train_head)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = dtype if rounded else torch.float32
        assert Engine(model, dtype).dtype_in_passes(trained) == expected
