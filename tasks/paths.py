"""Where parameters point on this machine; without torch and Prefect, so that a wrong path is refused at once."""

from __future__ import annotations

from pathlib import Path

from model.data.formats import file_type
from model.data.layout import find_layout
from model.files import path_of, shown_bare
from tasks.config import DEMO, SourceConfig


def is_on_hub(dataset: str) -> bool:
    """Whether a data set is one of the hub: of the form owner/name, and no local path.

    Raises:
        ValueError: as path_of.
    """
    return not path_of("dataset", dataset).exists() and _is_hub_id(dataset)


def _is_hub_id(dataset: str) -> bool:
    """Whether ``dataset`` has the form owner/name, and not that of a path."""
    return dataset.count("/") == 1 and not dataset.startswith((".", "/", "~")) and file_type(Path(dataset)) is None


def directory_of(parameter: str, value: str) -> Path:
    """A directory that a parameter names.

    Raises:
        FileNotFoundError: it is not there, or a file.
        ValueError: no directory can have that name.
    """
    path = path_of(parameter, value)
    if path.is_file():
        raise FileNotFoundError(
            f"{parameter} {shown_bare(value)} is not a directory but a file: name the directory that holds it"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"{parameter} {shown_bare(value)} does not exist{_from_here(value)}: give a directory as transformers' "
            "save_pretrained writes it"
        )
    return path


def _from_here(value: str) -> str:
    """Where a relative path begins, for a message: a worker starts each run in an empty directory."""
    return "" if Path(value).expanduser().is_absolute() else f" in {Path.cwd()}, where this process runs"


def local_dataset(dataset: str) -> Path:
    """The file or folder of a local data set.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: as path_of.
    """
    path = path_of("dataset", dataset)
    if not path.exists():
        raise FileNotFoundError(
            f"dataset {shown_bare(dataset)} does not exist{_from_here(dataset)}: give a file or folder, or a hub id "
            "like owner/name"
        )
    return path


def check_paths(config: SourceConfig) -> None:
    """Refuse local paths that hold nothing of what they should.

    Raises:
        FileNotFoundError, ValueError: as directory_of, and as model.data.layout.find_layout.
    """
    if config.dataset != DEMO and not is_on_hub(config.dataset):
        find_layout(local_dataset(config.dataset), config.dataset_config)
    for parameter in ("weights_dir", "tokenizer_dir"):
        if value := getattr(config, parameter):
            directory_of(parameter, value)
