"""Row 38: weights, config or tokenizer change between two steps of a run. What was hashed is what is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import flip, put_nan, swap_entries
from prefect.logging import disable_run_logger

from model.data.config import PrepareConfig
from model.engine.config import TrainConfig
from model.evaluation.config import SamplingConfig
from model.files import ChangedFileError
from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import plan_freeze
from tasks.choose import choose
from tasks.config import SourceConfig
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.frozen import load_frozen, load_its_tokenizer
from tasks.gang import Devices
from tasks.load_weights import check_weights
from tasks.prepare import find_or_write_tokens
from tasks.publish import export
from tasks.references import CheckpointRef, Sources, TrainingRef
from tasks.train import identify_training, train

PREPARE = PrepareConfig(max_length=80, validation_share=0.2, test_share=0.2)


pytestmark = pytest.mark.usefixtures("own_root")


@pytest.fixture
def sources(base: Path, data_dir: Path) -> Sources:
    with disable_run_logger():
        return download.fn(SourceConfig("tiny", str(data_dir), weights_dir=str(base)))


@pytest.fixture
def training(sources: Sources) -> TrainingRef:
    with disable_run_logger():
        tokens = find_or_write_tokens(sources, PREPARE)
    model = check_weights(sources.weights, "tiny")
    plan = plan_freeze(GPTConfig(**model.config), FreezeConfig(num_unfrozen_layers=1))
    return identify_training(tokens, model, plan, TrainConfig(precision="fp32", max_steps=1), "cpu")


CPU = Devices(("cpu",), (None,))
CHECKPOINT = CheckpointRef("no", 0, 0.0, 0.0, 0, 0, 2_048)
# Each step that loads the base or its tokenizer.
LOADINGS: dict[str, Callable[[Sources, TrainingRef], object]] = {
    "prepare": lambda sources, _: find_or_write_tokens(sources, replace(PREPARE, max_length=70)),
    "choose": lambda sources, _: choose.fn(sources, "tiny", "rows", PREPARE, None, 0.2),
    "load_weights": lambda sources, _: check_weights(sources.weights, "tiny"),
    "train": lambda _, training: train.fn(None, training, CPU, 0.0),  # type: ignore[arg-type]
    "evaluate": lambda _, training: evaluate.fn(None, training, CHECKPOINT, SamplingConfig(), CPU, 0.0),  # type: ignore[arg-type]
    "publish": lambda _, training: export(training, CHECKPOINT, Path("no"), ""),
}
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights, a bit": (lambda d: flip(d / "model.safetensors"), "model.safetensors"),
    "weights, NaN": (put_nan, "model.safetensors"),
    "config, a bit": (lambda d: flip(d / "config.json"), "config.json"),
    "tokenizer, two entries": (swap_entries, "tokenizer.json"),
    "tokenizer, settings": (lambda d: flip(d / "tokenizer_config.json"), "tokenizer_config.json"),
}


READS = {"prepare": {"config", "tokenizer"}, "choose": {"config", "tokenizer"}, "load_weights": {"config"}}


@pytest.mark.parametrize(
    ("loading", "change"),
    [
        (loading, change)
        for loading in LOADINGS
        for change in CHANGES
        if loading not in READS or change.split(",")[0] in READS[loading]
    ],
)
def test_a_change_in_mid_run_ends_it(
    base: Path, sources: Sources, training: TrainingRef, loading: str, change: str
) -> None:
    """Between download and each later step that reads the file."""
    spoil, name = CHANGES[change]
    spoil(base)
    with disable_run_logger(), pytest.raises(ChangedFileError, match=rf"{name} has changed since this run began"):
        LOADINGS[loading](sources, training)


def test_unchanged_files_load(training: TrainingRef) -> None:
    network = load_frozen(training.model, training.plan, torch.device("cpu"), torch.float32)
    tokenizer = load_its_tokenizer(training.model)
    assert (network.config.n_layer, len(tokenizer)) == (6, 4096)
