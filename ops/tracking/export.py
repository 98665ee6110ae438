"""``finetune export MODEL``: take a registered version out of MLflow.

It leaves as a plain Hugging Face directory, as a repository of a hub, as a GGUF file, or in several of these ways.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.files import atomic_directory, path_of
from ops.hub import HubError
from ops.hub_push import push_directory
from ops.mistakes import refuse
from ops.parsers import export_parser
from ops.redaction import without_credentials
from ops.settings import Settings
from ops.text import escape_output
from ops.tracking.connection import client, refusal, require_runs
from ops.tracking.flavour import FLAVOUR_PATTERNS, hash_version, plain_part
from ops.tracking.registry import fetch_version, find_version, version_uri

_REMEDY = "Restore its artifacts, or export another version"


@dataclass(frozen=True)
class Exported:
    """A registered version on this machine, verified.

    Attributes:
        uri: models:/NAME/VERSION.
        directory: its files, with MLflow's flavour; not to be changed.
        files: the sha256 of each file by its path.
    """

    uri: str
    directory: Path
    files: dict[str, str]


def fetch_model(settings: Settings, uri: str, log: Callable[[str], None]) -> Exported:
    """Find and verify a registered version.

    Args:
        uri: models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        ValueError: the URI has another form.
        LookupError: there is no such version.
        RuntimeError: its files cannot be had, or are not those that were registered.
    """
    require_runs(settings.tracking_uri)
    version = find_version(client(settings.tracking_uri), uri, "the model", "")
    directory, files = fetch_version(settings, version, log, _REMEDY)
    return Exported(version_uri(version), directory, files)


def write_directory(model: Exported, target: Path) -> None:
    """Copy the plain model, without MLflow's flavour, and verify the copy; it is whole or absent.

    Raises:
        FileExistsError: the target holds something already.
        OSError: it cannot be written, or what was written cannot be read back.
    """
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"{target} exists already: name a directory that does not, or is empty")
    wanted = plain_part(model.files)
    with atomic_directory(target) as scratch:
        for name in wanted:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.directory / name, scratch / name)
        if hash_version(scratch) != wanted:
            raise OSError(f"what was written for {target} is not {model.uri}: check the disk")


def push_model(model: Exported, repo_id: str, private: bool = False) -> str:
    """Upload the plain model, without MLflow's flavour, to a hub; returns the address of the commit.

    Args:
        private: as ``push_directory``.

    Raises:
        HubError: the hub does not answer or refuses.
    """
    message = f"Upload {model.uri.removeprefix('models:/').replace('/', ' version ')}"
    return push_directory(model.directory, repo_id, message, private, FLAVOUR_PATTERNS)


def write_model_as_gguf(model: Exported, file: Path, dtype: str = "f32") -> None:
    """Write the model as one GGUF file.

    Raises:
        ImportError, OSError, ValueError: as ``model.net.gguf_file.write_gguf``.
    """
    from model.net.gguf_file import write_gguf

    name = model.uri.removeprefix("models:/").partition("/")[0]
    write_gguf(model.directory, file, dtype, name, model.files)  # type: ignore[arg-type]


def main(arguments: list[str] | None = None) -> int:
    """Export a version as the options say. Returns the exit status."""
    from mlflow.exceptions import MlflowException

    parser = export_parser()
    given = parser.parse_args(arguments)
    if not (given.directory or given.push or given.gguf):
        parser.error("say where to: --directory DIR, --push USER/NAME or --gguf FILE")
    settings = Settings.load()
    try:
        model = fetch_model(settings, given.model, _tell)
        if given.directory:
            target = path_of("--directory", given.directory)
            write_directory(model, target)
            print(f"{model.uri} is in {target}")
        if given.gguf:
            file = path_of("--gguf", given.gguf)
            write_model_as_gguf(model, file, given.dtype)
            print(f"{model.uri} is in {file}")
        if given.push:
            print(f"{model.uri} is at {push_model(model, given.push, given.private)}")
    except MlflowException as error:
        _tell(refusal(without_credentials(settings.tracking_uri), error))
        return 1
    except (HubError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        return refuse(error)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    escape_output()
    sys.exit(main())
