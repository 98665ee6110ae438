"""Task ``download``: fetch the data set and the base's weights, and verify them."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.layout import find_layout
from model.demo import grammar
from model.files import atomic_directory, sha256_file
from model.net.config import normalize_size
from ops.hub import fetch_dataset
from ops.settings import Settings
from ops.tracking.registry import starting_uri
from ops.tracking.steps import pipeline_step
from tasks.config import DEMO, SourceConfig
from tasks.paths import is_on_hub, local_dataset
from tasks.references import DatasetRef, FileRef, Sources
from tasks.weights import find_weights, registered_weights


# No retries: ops.hub has its own, bounded, so that a dead network is reported within a minute.
@task(name="download", cache_policy=NO_CACHE)
@pipeline_step
def download(config: SourceConfig) -> Sources:
    """Find or fetch the data set and the weights, and verify them.

    Raises:
        HubError: the hub cannot be reached and nothing is cached.
        FileNotFoundError, ValueError: a local path is wrong, or a local file does not load or has changed.
        LookupError, RuntimeError: the version is not registered, or its files cannot be had.
    """
    settings = Settings.load()
    log = get_run_logger()
    size = normalize_size(config.model_size)
    uri = starting_uri(settings.tracking_uri, config.start_from, size)
    if config.start_from != "base" and not uri:
        log.info("there is no champion yet: starting from the base")
    if uri:
        weights = registered_weights(settings, uri, size, config.tokenizer_dir, log.info)
    else:
        weights = find_weights(settings, size, config.weights_dir, config.tokenizer_dir)
    sources = Sources(_dataset(settings, config), weights)
    log.info("data set %s, %s", sources.dataset.source, sources.dataset.revision or "local")
    for line in sources.dataset.left_out:
        log.warning("left out of %s: %s", sources.dataset.source, line)
    log.info("weights %s, %s", sources.weights.source, sources.weights.revision or "local")
    return sources


def _demo(settings: Settings) -> Path:
    """The project's own rows, in a directory named by the hash of the code that makes them."""
    target = settings.data_root / "demo" / grammar.code_sha256()[:16]
    if not target.exists():
        with atomic_directory(target) as scratch:  # other runs never see a part of it
            grammar.write_rows(scratch)
    return target


def _dataset(settings: Settings, config: SourceConfig) -> DatasetRef:
    """The files of the data set by split, with their hashes."""
    commit = None
    if config.dataset == DEMO:
        folder = _demo(settings)
    elif not is_on_hub(config.dataset):
        folder = local_dataset(config.dataset)
    else:
        folder, commit = fetch_dataset(config.dataset, config.dataset_revision, settings.hub_cache)
    layout = find_layout(folder, config.dataset_config)
    files = {
        split: [FileRef(str(path), sha256_file(path), path.stat().st_size) for path in paths]
        for split, paths in layout.splits.items()
    }
    return DatasetRef(config.dataset, commit, files, tuple(layout.left_out))
