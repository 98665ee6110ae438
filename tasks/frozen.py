"""Load the base, frozen as planned, and its tokenizer; used by all tasks that compute with the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.engine.trunk import TrunkCacheConfig
from model.engine.trunk_sharing import SharedTrunks
from model.net.device import cast_frozen, give_memory_back
from model.net.freezing import FreezePlan
from model.net.gpt import GPTModel
from model.net.loading import check_hashes, load_frozen_model
from model.net.tokenizer import load_tokenizer
from model.threads import shorten_switch_interval
from ops.settings import Settings
from tasks.references import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def trunk_cache(gigabytes: float, shared: SharedTrunks | None = None) -> TrunkCacheConfig:
    """Where this machine's processes keep the outputs of frozen blocks.

    Args:
        gigabytes: their limit.
        shared: as ``TrunkCacheConfig``.
    """
    return TrunkCacheConfig(Settings.load().trunk_outputs, int(gigabytes * 1e9), shared)


def load_frozen(model: ModelRef, plan: FreezePlan, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """Load the base, frozen as planned, on a device; the frozen part is cast to ``dtype``.

    The tokenizer's files are compared with what they were, but not loaded: a training does not need transformers,
    whose import takes a second.

    Raises:
        ChangedFileError: a file of the base or the tokenizer is not what it was when the run began.
        RuntimeError: other parameters would train than planned: the code changed between the tasks.
    """
    shorten_switch_interval()
    network = load_frozen_model(
        model.model_size,
        Path(model.directory),
        freeze_layers=plan.num_unfrozen_layers is not None,
        num_unfrozen_layers=plan.num_unfrozen_layers or 0,
        train_head=plan.train_head,
        device=device,
        files=model.files,
    )
    check_hashes(Path(model.tokenizer_directory), model.tokenizer_files)
    names = tuple(name for name, p in network.named_parameters() if p.requires_grad)
    if names != plan.names:
        raise RuntimeError(f"other parameters would train than planned: {sorted({*names} ^ {*plan.names})[:5]}")
    cast_frozen(network, dtype)
    return network


class ReusableBase:
    """A base that stays loaded for several trainings in turn. Each gets it as it was loaded, bit for bit.

    It is loaded and hashed again only where a training freezes it otherwise, or computes in another dtype.

    Args:
        device: of the trainings.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._network: GPTModel | None = None
        self._loaded: tuple[ModelRef, FreezePlan, torch.dtype] | None = None
        self._trained: dict[str, torch.Tensor] = {}

    def has(self, model: ModelRef, plan: FreezePlan, dtype: torch.dtype) -> bool:
        """Whether ``get`` would not load it again."""
        return self._network is not None and self._loaded == (model, plan, dtype)

    def get(self, model: ModelRef, plan: FreezePlan, dtype: torch.dtype) -> GPTModel:
        """The base for the next training; the model of the training before is not to be used any more.

        Raises:
            ChangedFileError, RuntimeError: as load_frozen.
        """
        if not self.has(model, plan, dtype):
            self._network, self._trained = None, {}
            give_memory_back()
            self._network = load_frozen(model, plan, self.device, dtype)
            self._loaded = model, plan, dtype
            self._trained = {name: p.detach().cpu().clone() for name, p in _trained_parameters(self._network)}
        assert self._network is not None
        for name, parameter in _trained_parameters(self._network):
            parameter.data.copy_(self._trained[name])
            parameter.grad = None
        return self._network.eval()


def _trained_parameters(network: GPTModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def load_its_tokenizer(model: ModelRef) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base.

    Raises:
        ChangedFileError: a file of it is not what it was when the run began.
    """
    return load_tokenizer(model.tokenizer_directory, model.config["vocab_size"], model.tokenizer_files)
