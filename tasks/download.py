"""Task ``download``: fetch the data set and the base's weights, and verify them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import AfterValidator, Field

from model.data.formats import file_type
from model.data.layout import find_layout
from model.demo import grammar
from model.files import atomic_directory, path_of, sha256_file
from model.net.config import PRESETS, normalize_size
from model.parameters import Parameters
from ops.hub import DEFAULT_DATASET, fetch_dataset
from ops.settings import Settings
from ops.tracking.registry import starting_uri
from ops.tracking.steps import pipeline_step
from tasks.references import DatasetRef, FileRef, Sources
from tasks.weights import find_weights, registered_weights

DEMO = "demo"


# The pattern lets Prefect's server refuse a wrong size when a run is submitted.
Size = Annotated[
    str,
    AfterValidator(normalize_size),
    Field(json_schema_extra={"pattern": f"^({'|'.join([*PRESETS, *(name.upper() for name in PRESETS)])})$"}),
]


_Given = Annotated[str, Field(min_length=1)]  # an empty text is a mistake, not "none"


@dataclass(frozen=True)
class SourceConfig(Parameters):
    """Where rows and weights come from."""

    model_size: Size = "124m"
    """tiny, 124m, 355m, 774m or 1558m."""
    dataset: _Given = DEFAULT_DATASET
    """A hub id, a local file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, or these with .gz), a folder of such
    files, or "demo"."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit that it resolves to is recorded."""
    weights_dir: _Given | None = None
    """A local directory in Hugging Face's GPT-2 layout; null takes the hub's weights at a pinned commit."""
    tokenizer_dir: _Given | None = None
    """A local directory with the tokenizer, if it is not beside the weights."""
    dataset_config: str | None = None
    """Configuration to use of a data set whose card (README.md) names several."""
    start_from: Annotated[str, Field(pattern=r"^(base|champion|models:/.+)$")] = "base"
    """base; champion (the base if there is none yet); or a registered version, models:/NAME/VERSION or
    models:/NAME@ALIAS, which brings its own weights and tokenizer."""


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
    path = path_of("dataset", config.dataset)
    if config.dataset == DEMO:
        folder = _demo(settings)
    elif path.exists() or not _is_hub_id(config.dataset):
        folder = path
    else:
        folder, commit = fetch_dataset(config.dataset, config.dataset_revision, settings.hub_cache)
    layout = find_layout(folder, config.dataset_config)
    files = {
        split: [FileRef(str(path), sha256_file(path), path.stat().st_size) for path in paths]
        for split, paths in layout.splits.items()
    }
    return DatasetRef(config.dataset, commit, files, tuple(layout.left_out))


def _is_hub_id(dataset: str) -> bool:
    """Whether ``dataset`` has the form owner/name, and not that of a path."""
    return dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")) and file_type(Path(dataset)) is None
