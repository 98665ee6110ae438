"""Freezing: all parameters are frozen, then the top blocks, the final norm and, optionally, the head are unfrozen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from model.net.config import FreezeConfig, GPTConfig
from model.net.empty import empty_models
from model.net.gpt import GPTModel


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters train after freezing.

    Attributes:
        num_unfrozen_layers: number of blocks that train, from the top; None if nothing is frozen.
        train_head: whether an untied copy of the head trains.
        names: names of the trainable parameters, in the model's order.
        trainable: number of trainable scalars.
        total: number of scalars in the model, a tied head counted once.
    """

    num_unfrozen_layers: int | None
    train_head: bool
    names: tuple[str, ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable scalars over all scalars."""
        return self.trainable / self.total


def freeze_bottom_layers(model: GPTModel, num_unfrozen_layers: int, train_head: bool = False) -> FreezePlan:
    """Freeze the model except its top blocks and the final norm.

    Embeddings stay frozen, and so does the head, which is the token embedding: training it would force the
    backward pass through the whole trunk. ``train_head`` unties it first (a copy, V x D more parameters).

    Args:
        model: changed in place; its ``num_frozen`` blocks become the trunk.
        num_unfrozen_layers: number of blocks to train, counted from the top; 0 trains the final norm alone.
        train_head: whether to train an untied copy of the head too.

    Raises:
        ValueError: num_unfrozen_layers is not between 0 and the number of blocks.
    """
    config = model.config
    FreezeConfig(num_unfrozen_layers=num_unfrozen_layers).check(config.n_layer)
    if train_head and model.lm_head.weight is model.wte.weight:
        model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
        model.config = replace(config, tie_word_embeddings=False)
    model.requires_grad_(False)
    model.num_frozen = config.n_layer - num_unfrozen_layers
    trained: list[nn.Module] = [*model.h[model.num_frozen :], model.ln_f]
    if train_head:
        trained.append(model.lm_head)
    for module in trained:
        module.requires_grad_(True)
    model.train(model.training)
    return _describe(model, num_unfrozen_layers, train_head)


def _describe(model: GPTModel, num_unfrozen_layers: int | None, train_head: bool) -> FreezePlan:
    parameters = dict(model.named_parameters())  # a tied head appears once
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return FreezePlan(
        num_unfrozen_layers=num_unfrozen_layers,
        train_head=train_head,
        names=tuple(trained),
        trainable=sum(p.numel() for p in trained.values()),
        total=sum(p.numel() for p in parameters.values()),
    )


def plan_freeze(config: GPTConfig, freeze: FreezeConfig) -> FreezePlan:
    """The plan for a model of this shape, without its weights (built on the meta device).

    Raises:
        ValueError: as FreezeConfig.check.
    """
    with empty_models():
        model = GPTModel(config)
    if freeze.freeze_layers:
        return freeze_bottom_layers(model, freeze.num_unfrozen_layers, freeze.train_head)
    return _describe(model, None, train_head=False)
