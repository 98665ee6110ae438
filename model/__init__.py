"""GPT-2 in torch: architecture, weights, freezing, data, training and sampling. No Prefect, no MLflow."""

from model.config import GPTConfig
from model.freezing import FreezePlan, freeze_bottom_layers
from model.gpt import GPTModel
from model.loading import load_gpt_model
from model.prompt import format_prompt
from model.sampling import filter_logits, generate

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
