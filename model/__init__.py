"""GPT-2 in torch: architecture, weights, freezing, data, training and sampling. No Prefect, no MLflow."""

from model.net.config import GPTConfig
from model.net.freezing import FreezePlan, freeze_bottom_layers
from model.net.gpt import GPTModel
from model.net.loading import load_gpt_model
from model.net.prompt import format_prompt
from model.net.sampling import filter_logits, generate

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
