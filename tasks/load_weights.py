"""Task ``load_weights``: check every key and shape of the base before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.files import sha256_json
from model.net.config import normalize_size
from model.net.layout import model_files
from model.net.loading import check_pretrained, check_size
from ops.tracking.steps import pipeline_step
from tasks.references import ModelRef, WeightsRef


@task(name="load_weights", cache_policy=NO_CACHE)
@pipeline_step
def load_weights(weights: WeightsRef, model_size: str) -> ModelRef:
    """Check the base against its config and the size asked for, from the files' headers.

    Raises:
        FileNotFoundError, ValueError: as check_weights.
    """
    log = get_run_logger()
    model = check_weights(weights, model_size, log.info)
    log.info("%s: every key and shape fits a %s GPT-2", model.directory, model_size)
    return model


def check_weights(weights: WeightsRef, model_size: str, log: Callable[[str], None] | None = None) -> ModelRef:
    """A reference to a base whose every key and shape fits its config and the size.

    Args:
        log: told what was done to the keys to make them fit.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        ChangedFileError: a file has changed since it was hashed.
        ValueError: a key, a shape or the size does not fit; the message names it.
    """
    directory = Path(weights.directory)
    config = check_pretrained(directory, weights.files, log)
    check_size(config, model_size, directory)
    return ModelRef(
        model_size=normalize_size(model_size),
        directory=weights.directory,
        tokenizer_directory=weights.tokenizer_directory,
        source=weights.source,
        sha256=sha256_json(weights.files),
        config=asdict(config),
        files={path.name: weights.files[path.name] for path in model_files(directory)},
        tokenizer_files=weights.tokenizer_files,
    )
