"""Task ``freeze``: decide by name which parameters train, and count them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.config import GPTConfig
from model.device import cast_frozen
from model.freezing import FreezePlan, plan_freeze
from model.gpt import GPTModel
from model.loading import load_gpt_model
from tasks.references import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@task(name="freeze", cache_policy=NO_CACHE)
def freeze(model: ModelRef, freeze_layers: bool, num_unfrozen_layers: int, train_head: bool) -> FreezePlan:
    """Plan the freeze; ``train`` and ``evaluate`` apply it to the model they load.

    Raises:
        ValueError: num_unfrozen_layers is more than the model's blocks.
    """
    plan = plan_freeze(GPTConfig(**model.config), freeze_layers, num_unfrozen_layers, train_head)
    get_run_logger().info(
        "%d of %d parameters train (%.1f %%), in %d tensors",
        plan.trainable,
        plan.total,
        100 * plan.share,
        len(plan.names),
    )
    return plan


def load_frozen(
    model: ModelRef, plan: FreezePlan, device: torch.device, dtype: torch.dtype
) -> tuple[GPTModel, PreTrainedTokenizerBase]:
    """Load the base on its device, frozen as planned and its frozen part in ``dtype``, with the tokenizer.

    Raises:
        RuntimeError: other parameters would train than planned: the code changed between the tasks.
    """
    network, tokenizer = load_gpt_model(
        model.model_size,
        model.directory,
        freeze_layers=plan.num_unfrozen_layers is not None,
        num_unfrozen_layers=plan.num_unfrozen_layers or 0,
        train_head=plan.train_head,
        tokenizer_dir=model.tokenizer_directory,
        device=device,
    )
    names = tuple(name for name, p in network.named_parameters() if p.requires_grad)
    if names != plan.names:
        raise RuntimeError(f"other parameters would train than planned: {sorted({*names} ^ {*plan.names})[:5]}")
    cast_frozen(network, dtype)
    return network, tokenizer
