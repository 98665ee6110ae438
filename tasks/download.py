"""Task ``download``: fetch the data set and the base's weights, and verify them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from pydantic import AfterValidator, Field

from model.data.formats import file_type
from model.data.layout import find_layout
from model.demo import EMBEDDED_BASE, grammar
from model.files import atomic_directory, sha256_file, write_json
from model.net.config import PRESETS, GPTConfig, normalize_size
from model.net.layout import CONFIG_FILE, weight_files
from model.net.loading import check_size
from model.parameters import Parameters
from model.records import read_record
from ops.hub import DEFAULT_DATASET, PINNED_WEIGHTS, fetch_dataset, fetch_weights
from ops.machine.flock import hold_file
from ops.settings import Settings
from ops.tracking.registry import fetch_version, find_version, starting_uri
from ops.tracking.runs import client
from ops.tracking.steps import pipeline_step
from tasks.references import DatasetRef, FileRef, Sources, WeightsRef

DEMO = "demo"


# The pattern lets Prefect's server refuse a wrong size when a run is submitted.
Size = Annotated[
    str,
    AfterValidator(normalize_size),
    Field(json_schema_extra={"pattern": f"^({'|'.join([*PRESETS, *(name.upper() for name in PRESETS)])})$"}),
]


@dataclass(frozen=True)
class SourceConfig(Parameters):
    """Where rows and weights come from."""

    model_size: Size = "124m"
    """tiny, 124m, 355m, 774m or 1558m."""
    dataset: str = DEFAULT_DATASET
    """A hub id, a local file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, or these with .gz), a folder of such
    files, or "demo"."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set; the commit that it resolves to is recorded."""
    weights_dir: str | None = None
    """A local directory in Hugging Face's GPT-2 layout; null takes the hub's weights at a pinned commit."""
    tokenizer_dir: str | None = None
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
        FileNotFoundError, ValueError: a local path is wrong, or a local weight file has changed.
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
        weights = _weights(settings, size, config.weights_dir, config.tokenizer_dir)
    sources = Sources(_dataset(settings, config), weights)
    log.info("data set %s, %s", sources.dataset.source, sources.dataset.revision or "local")
    for line in sources.dataset.left_out:
        log.warning("left out of %s: %s", sources.dataset.source, line)
    log.info("weights %s, %s", sources.weights.source, sources.weights.revision or "local")
    return sources


def _demo(settings: Settings) -> Path:
    """The project's own rows, in a directory named by the hash of the code that makes them."""
    target = settings.data_root / "demo" / grammar.code_sha256()[:16]
    _write_once(target, grammar.write_rows)
    return target


def _write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory unless it exists; other runs never see a part of it."""
    if not target.exists():
        with atomic_directory(target) as scratch:
            write(scratch)


def _dataset(settings: Settings, config: SourceConfig) -> DatasetRef:
    """The files of the data set by split, with their hashes."""
    commit = None
    path = Path(config.dataset).expanduser()
    if config.dataset == DEMO:
        folder = _demo(settings)
    elif path.exists() or not _is_hub_id(config.dataset):
        folder = path.resolve()
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


def _weights(settings: Settings, size: str, weights_dir: str | None, tokenizer_dir: str | None) -> WeightsRef:
    revision = None
    if weights_dir:
        source, directory = weights_dir, Path(weights_dir).expanduser().resolve()
        if not directory.is_dir():
            raise FileNotFoundError(f"weights_dir {weights_dir} is not a directory")
        files = _trusted(settings, directory)
    elif size == "tiny":
        source, directory = "embedded", EMBEDDED_BASE
        files = {path.name: sha256_file(path) for path in [directory / CONFIG_FILE, *weight_files(directory)]}
    else:
        source, revision = PINNED_WEIGHTS[size]
        snapshot = fetch_weights(source, revision, settings.hub_cache)
        directory, revision = snapshot.path, snapshot.commit
        files = snapshot.files
    if tokenizer_dir and not Path(tokenizer_dir).expanduser().is_dir():
        raise FileNotFoundError(f"tokenizer_dir {tokenizer_dir} is not a directory")
    tokenizer = Path(tokenizer_dir).expanduser().resolve() if tokenizer_dir else directory
    return WeightsRef(source, revision, str(directory), files, str(tokenizer))


def registered_weights(
    settings: Settings, uri: str, size: str, tokenizer_dir: str | None, log: Callable[[str], None]
) -> WeightsRef:
    """A registered version as weights to start from.

    Args:
        uri: models:/NAME/VERSION.

    Raises:
        LookupError: there is no such version.
        RuntimeError: its files cannot be had, or are not those that were registered.
        ValueError: it has another size, or tokenizer_dir holds another tokenizer than it was trained with.
    """
    directory, files = fetch_version(settings, find_version(client(settings.tracking_uri), uri), log)
    try:
        check_size(GPTConfig.from_json(directory / CONFIG_FILE), size, Path(uri))
    except ValueError as error:
        raise ValueError(f"{error}: choose a version of that size in start_from, or another model_size") from error
    if tokenizer_dir and _vocabulary(Path(tokenizer_dir).expanduser()) != _vocabulary(directory):
        raise ValueError(
            f"{uri} was trained with another tokenizer than that of tokenizer_dir {tokenizer_dir}: leave "
            "tokenizer_dir out, since a version brings its own, or start from the base (start_from=base)"
        )
    used = [directory / CONFIG_FILE, *weight_files(directory)]
    return WeightsRef(uri, None, str(directory), {path.name: files[path.name] for path in used}, str(directory))


def _vocabulary(directory: Path) -> dict[str, int]:
    """The tokens of a tokenizer by their text."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(directory, local_files_only=True).get_vocab())


def _trusted(settings: Settings, directory: Path) -> dict[str, str]:
    """Hash a local directory's files, and compare the hashes with those of the first use.

    A flipped bit in a safetensors file loads without complaint and trains a quietly damaged model.

    Raises:
        ValueError: a file changed; the message says how to accept it.
    """
    settings.data_root.mkdir(parents=True, exist_ok=True)
    files = {}
    with hold_file(settings.data_root / ".trusted-weights.lock", wait=True):
        record = settings.trusted_hashes
        try:
            known = read_record(record, dict[str, str]) if record.exists() else {}
        except ValueError as error:
            raise ValueError(f"{error}. Mend it, or remove it to trust the files as they are now") from error
        for path in [directory / CONFIG_FILE, *weight_files(directory)]:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: weights_dir needs Hugging Face's GPT-2 layout")
            files[path.name] = sha256_file(path)
            first = known.setdefault(str(path), files[path.name])
            if first != files[path.name]:
                raise ValueError(
                    f"{path} is not the file it was at first use: sha256 {files[path.name]}, then {first}. If it was "
                    f"meant to change, remove its line from {record}; else restore the file"
                )
        write_json(record, known)
    return files
