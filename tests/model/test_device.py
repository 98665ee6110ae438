"""Device and precision."""

from __future__ import annotations

import pytest
import torch

from model import GPTModel
from model.device import autocast, cast_frozen, resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_device_names() -> None:
    """auto is the GPU where there is one; asking for one that is not there names the way out."""
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'cuda' is asked for.*device=cpu"):
            resolve_device("cuda")


def test_precision_names() -> None:
    """#16: named precisions are what they say; an unknown one is refused."""
    assert resolve_precision("fp32", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision 'fp16' is none of auto, bf16, fp32"):
        resolve_precision("fp16", CPU)


def test_cast_frozen_leaves_the_trained_in_fp32(tiny_model: GPTModel) -> None:
    """#16, #13: the frozen rest is stored in bf16, and the tied head stays tied."""
    cast_frozen(tiny_model, torch.bfloat16)
    for name, parameter in tiny_model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert tiny_model.lm_head.weight is tiny_model.wte.weight
    assert tiny_model.lm_head.weight.data_ptr() == tiny_model.wte.weight.data_ptr()


def test_autocast_acts_in_bf16_only() -> None:
    """fp32 means fp32."""
    x = torch.randn(4, 4)
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
