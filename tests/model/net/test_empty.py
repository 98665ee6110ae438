"""Models without values."""

from __future__ import annotations

import torch

from model.net.config import GPTConfig
from model.net.empty import empty_models
from model.net.gpt import GPTModel


def test_names_and_shapes_are_those_of_the_model() -> None:
    """No parameter has memory; models that are made later have values, and no random number was drawn."""
    config = GPTConfig.preset("tiny")
    torch.manual_seed(3)
    real = dict(GPTModel(config).named_parameters())
    torch.manual_seed(3)
    with empty_models():
        empty = dict(GPTModel(config).named_parameters())
    assert {name: each.shape for name, each in empty.items()} == {name: each.shape for name, each in real.items()}
    assert {each.device.type for each in empty.values()} == {"meta"}
    again = dict(GPTModel(config).named_parameters())
    assert all(torch.equal(again[name], each) for name, each in real.items())
