"""Load the base, frozen as planned; shared by ``train``, ``evaluate``, ``score_champion`` and ``publish``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.net.device import cast_frozen
from model.net.freezing import FreezePlan
from model.net.gpt import GPTModel
from model.net.loading import load_gpt_model
from tasks.references import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_frozen(
    model: ModelRef, plan: FreezePlan, device: torch.device, dtype: torch.dtype
) -> tuple[GPTModel, PreTrainedTokenizerBase]:
    """Load the base with its tokenizer, frozen as planned, on a device; the frozen part is cast to ``dtype``.

    Raises:
        ChangedFileError: a file of the base or the tokenizer is not what it was when the run began.
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
        files=model.files,
        tokenizer_files=model.tokenizer_files,
    )
    names = tuple(name for name, p in network.named_parameters() if p.requires_grad)
    if names != plan.names:
        raise RuntimeError(f"other parameters would train than planned: {sorted({*names} ^ {*plan.names})[:5]}")
    cast_frozen(network, dtype)
    return network, tokenizer
