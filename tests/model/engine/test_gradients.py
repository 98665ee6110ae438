"""The buffer of gradients: parts of one tensor that backward passes write to."""

from __future__ import annotations

import pytest
import torch

from model.engine.gradients import GradientBuffer


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_gradients_are_parts_of_the_buffer(parts: int) -> None:
    """Backward passes add to it, its parts are of equal size, and zeros between gradients stay."""
    parameters = [
        torch.ones(3, 5, requires_grad=True),
        torch.ones(64, requires_grad=True),
        torch.ones((), requires_grad=True),
    ]
    buffer = GradientBuffer(parameters, parts)
    assert buffer.flat.numel() % parts == 0
    for _ in range(2):
        sum(((i + 1) * p).sum() for i, p in enumerate(parameters)).backward()  # type: ignore[union-attr]
    assert [float(p.grad.flatten()[0]) for p in parameters] == [2.0, 4.0, 6.0]  # type: ignore[union-attr]
    assert buffer.flat.sum() == 2 * 15 + 4 * 64 + 6
    assert all(p.grad.data_ptr() % 256 == buffer.flat.data_ptr() % 256 for p in parameters)  # type: ignore[union-attr]
    buffer.zero()
    assert not any(p.grad.any() for p in parameters)  # type: ignore[union-attr]
