"""Task ``download``: get the data set and the base's weights, and prove that they are what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.rows import SUFFIXES, find_splits
from model.demo import EMBEDDED_BASE, grammar
from model.files import atomic_directory, sha256_file, write_json
from model.net.config import GPTConfig, normalize_size
from model.net.loading import CONFIG_FILE, check_size, weight_files
from ops.hub import PINNED_WEIGHTS, fetch_dataset, fetch_weights
from ops.machine.flock import hold_file
from ops.settings import Settings
from ops.tracking.registry import fetch_version, find_version, starting_uri
from ops.tracking.runs import client
from tasks.references import DatasetRef, FileRef, Sources, WeightsRef

DEMO = "demo"


# No retries: ops.hub has its own, bounded, so that a dead network is reported within a minute.
@task(name="download", cache_policy=NO_CACHE)
def download(
    dataset: str,
    dataset_revision: str | None,
    model_size: str,
    weights_dir: str | None,
    tokenizer_dir: str | None,
    start_from: str = "base",
) -> Sources:
    """Find or fetch the data set and the weights.

    Args:
        dataset: a local file or folder, a hub id, or "demo".
        dataset_revision: of the hub's data set; the commit it resolves to is recorded.
        model_size: chooses the pinned weights on the hub; "tiny" is the embedded base.
        weights_dir: a local directory in Hugging Face's layout instead.
        tokenizer_dir: a local directory with the tokenizer, if it is not beside the weights.
        start_from: "base"; "champion", the registered champion of this size, or the base if there is none; or the
            URI of a registered version. A version brings its own weights and tokenizer.

    Raises:
        HubError: the hub cannot be reached and nothing is cached.
        FileNotFoundError, ValueError: a local path is wrong, or a local weight file has changed.
        LookupError, RuntimeError: the version is not registered, or its files cannot be had.
    """
    settings = Settings.load()
    log = get_run_logger()
    uri = starting_uri(settings.tracking_uri, start_from, normalize_size(model_size))
    if start_from != "base" and not uri:
        log.info("there is no champion yet: starting from the base")
    if uri:
        weights = registered_weights(settings, uri, normalize_size(model_size), tokenizer_dir, log.info)
    else:
        weights = _weights(settings, normalize_size(model_size), weights_dir, tokenizer_dir)
    sources = Sources(_dataset(settings, dataset, dataset_revision), weights)
    log.info("data set %s, %s", sources.dataset.source, sources.dataset.revision or "local")
    log.info("weights %s, %s", sources.weights.source, sources.weights.revision or "local")
    return sources


def _demo(settings: Settings) -> Path:
    """The project's own rows, in a directory named by the code that makes them."""
    target = settings.data_root / "demo" / sha256_file(Path(grammar.__file__))[:16]
    _write_once(target, grammar.write_rows)
    return target


def _write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory unless it is there; another run never sees half of it."""
    if not target.exists():
        with atomic_directory(target) as scratch:
            write(scratch)


def _dataset(settings: Settings, dataset: str, revision: str | None) -> DatasetRef:
    commit = None
    if dataset == DEMO:
        splits = find_splits(_demo(settings))
    elif Path(dataset).expanduser().exists() or not _is_hub_id(dataset):
        splits = find_splits(Path(dataset).expanduser().resolve())
    else:
        directory, commit = _hub_dataset(settings, dataset, revision)
        splits = find_splits(directory)
    files = {
        split: [FileRef(str(path), sha256_file(path), path.stat().st_size) for path in paths]
        for split, paths in splits.items()
    }
    return DatasetRef(dataset, commit, files)


def _is_hub_id(dataset: str) -> bool:
    """Whether it reads like owner/name rather than like a path."""
    return (
        dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")) and Path(dataset).suffix not in SUFFIXES
    )


def _hub_dataset(settings: Settings, dataset: str, revision: str | None) -> tuple[Path, str]:
    """The hub's splits as JSON lines, written once a commit."""
    tables, commit = fetch_dataset(dataset, revision, settings.hub_cache)
    target = settings.datasets / dataset.replace("/", "--") / commit

    def write(directory: Path) -> None:
        for split, table in tables.items():
            table.to_json(directory / f"{split}.jsonl", lines=True, force_ascii=False)

    _write_once(target, write)
    return target, commit


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
    """Hash a local directory's files, and compare with what they were at first use.

    A flipped bit in a safetensors file loads without complaint and trains a quietly damaged model.

    Raises:
        ValueError: a file changed; the message says how to accept it.
    """
    settings.data_root.mkdir(parents=True, exist_ok=True)
    files = {}
    with hold_file(settings.data_root / ".trusted-weights.lock", wait=True):
        record = settings.trusted_hashes
        try:
            known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
        except ValueError as error:
            raise ValueError(
                f"{record} is not JSON any more ({error}): mend it, or remove it to trust the files as they are now"
            ) from error
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
