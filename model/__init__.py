"""GPT-2 in torch: architecture, weights, freezing, data, training and sampling. No Prefect, no MLflow.

The names below are imported from their modules at first use, as those of ``prefect`` are: ``import model`` does not
import torch, so that parameters and files can be checked without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.generation.generating import generate
    from model.net.config import GPTConfig
    from model.net.freezing import FreezePlan, freeze_bottom_layers
    from model.net.gpt import GPTModel
    from model.net.loading import load_gpt_model
    from model.net.prompt import format_prompt
    from model.net.sampling import filter_logits

__all__ = [
    "FreezePlan",
    "GPTConfig",
    "GPTModel",
    "filter_logits",
    "format_prompt",
    "freeze_bottom_layers",
    "generate",
    "load_gpt_model",
]

_MODULES = {
    "FreezePlan": "model.net.freezing",
    "GPTConfig": "model.net.config",
    "GPTModel": "model.net.gpt",
    "filter_logits": "model.net.sampling",
    "format_prompt": "model.net.prompt",
    "freeze_bottom_layers": "model.net.freezing",
    "generate": "model.generation.generating",
    "load_gpt_model": "model.net.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
