"""The base's files: found or fetched, checked, and compared with what they were at first use.

A reference holds the sha256 of every file that is loaded later, and each loading compares them (model.net.loading).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.demo import EMBEDDED_BASE, EMBEDDED_SHA256
from model.files import sha256_file, write_json
from model.net.config import GPTConfig
from model.net.layout import CONFIG_FILE, model_files
from model.net.loading import check_size, hash_pretrained, wait_for_hashes
from model.net.tokenizer import hash_tokenizer, import_ahead, load_tokenizer, tokenizer_hashes
from model.records import read_record
from ops.hub import PINNED_WEIGHTS, fetch_weights
from ops.machine.flock import hold_file
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.registry import fetch_version, find_version
from tasks.paths import directory_of
from tasks.references import WeightsRef


def find_weights(settings: Settings, size: str, weights_dir: str | None, tokenizer_dir: str | None) -> WeightsRef:
    """The base of a size: a local directory, the embedded one, or the hub's at its pinned commit.

    Raises:
        HubError: the hub cannot be reached and nothing is cached.
        FileNotFoundError, ValueError: a local directory is wrong, its files do not load, or have changed since their
            first use.
    """
    tokenizer = directory_of("tokenizer_dir", tokenizer_dir) if tokenizer_dir else None
    if weights_dir:
        directory = directory_of("weights_dir", weights_dir)
        import_ahead()  # while the weights are read and hashed
        with _first_uses(settings) as record:
            files = record.weights(directory)
            vocab_size = GPTConfig.from_json(directory / CONFIG_FILE, files[CONFIG_FILE]).vocab_size
            of_tokenizer = record.tokenizer(tokenizer or directory, vocab_size)
        return WeightsRef(weights_dir, None, str(directory), files, str(tokenizer or directory), of_tokenizer)
    if size == "tiny":
        source, commit, directory, known = "embedded", None, EMBEDDED_BASE, _embedded()
        files = {path.name: known[path.name] for path in model_files(directory)}
    else:
        source, commit = PINNED_WEIGHTS[size]
        snapshot = fetch_weights(source, commit, settings.hub_cache)
        directory, commit, files = snapshot.path, snapshot.commit, snapshot.files
        known = files
    of_tokenizer = tokenizer_hashes(known)
    if tokenizer:
        vocab_size = GPTConfig.from_json(directory / CONFIG_FILE, files[CONFIG_FILE]).vocab_size
        with _first_uses(settings) as record:
            # OpenAI's weights go with OpenAI's tokenizer only; with another they compute, and make no sense.
            of_tokenizer = record.tokenizer(tokenizer, vocab_size, gpt2=size != "tiny")
    return WeightsRef(source, commit, str(directory), files, str(tokenizer or directory), of_tokenizer)


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
    config = GPTConfig.from_json(directory / CONFIG_FILE, files.get(CONFIG_FILE))
    try:
        check_size(config, size, Path(uri))
    except ValueError as error:
        raise ValueError(f"{error}: choose a version of that size in start_from, or another model_size") from error
    of_tokenizer = tokenizer_hashes(files)
    if tokenizer_dir:
        given = load_tokenizer(directory_of("tokenizer_dir", tokenizer_dir), config.vocab_size)
        if given.get_vocab() != load_tokenizer(directory, config.vocab_size, of_tokenizer).get_vocab():
            raise ValueError(
                f"{uri} was trained with another tokenizer than that of tokenizer_dir {tokenizer_dir}: leave "
                "tokenizer_dir out, since a version brings its own, or start from the base (start_from=base)"
            )
    used = {path.name: files[path.name] for path in model_files(directory)}
    return WeightsRef(uri, None, str(directory), used, str(directory), of_tokenizer)


def _embedded() -> dict[str, str]:
    """The hashes of the embedded base's files, which are those of the release.

    Raises:
        ValueError: a file is damaged or missing.
    """
    for name, known in EMBEDDED_SHA256.items():
        path = EMBEDDED_BASE / name
        if not path.is_file() or sha256_file(path) != known:
            raise ValueError(
                f"{path} is not the file of this release, which has the sha256 {known}: restore it (`git checkout -- "
                "model/demo/base`), or install the package again"
            )
    return EMBEDDED_SHA256


class _Record:
    """The sha256 of local files at their first use, by path.

    A flipped bit in a safetensors file loads without complaint and trains a quietly damaged model. A file is recorded
    once it has loaded: a broken one may be replaced by a whole one.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._known = read_record(path, dict[str, str]) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{error}. Mend it, or remove it to trust the files as they are now") from error

    def weights(self, directory: Path) -> dict[str, str]:
        """The hashes of config.json and the weights. At first use each value is checked; every byte is read once.

        Raises:
            FileNotFoundError, ValueError: they do not load, or changed since their first use.
        """
        wait_for_hashes()
        paths = model_files(directory)
        if all(str(path) in self._known and path.is_file() for path in paths):
            files = {path.name: sha256_file(path) for path in paths}
        else:
            _, files = hash_pretrained(directory)
        self._compare(directory, files)
        return files

    def tokenizer(self, directory: Path, vocab_size: int, gpt2: bool = False) -> dict[str, str]:
        """The hashes of a tokenizer's files. At first use it is loaded.

        Args:
            gpt2: whether it has to be GPT-2's own, which is checked each time.

        Raises:
            ValueError: it does not load, or changed since its first use.
        """
        files = hash_tokenizer(directory)
        if gpt2 or not files or not all(str(directory / name) in self._known for name in files):
            load_tokenizer(directory, vocab_size, files, gpt2)
        self._compare(directory, files)
        return files

    def _compare(self, directory: Path, files: dict[str, str]) -> None:
        """Raise ValueError if a file changed; the message says how to accept it. Record new ones."""
        for name, found in files.items():
            path = directory / name
            first = self._known.get(str(path), found)
            if first != found:
                raise ValueError(
                    f"{path} is not the file it was at first use: sha256 {found}, then {first}. If it was "
                    f"meant to change, remove its line from {self._path}; else restore the file"
                )
        new = {str(directory / name): found for name, found in files.items()}
        if not new.items() <= self._known.items():
            self._known |= new
            write_json(self._path, self._known)


@contextmanager
def _first_uses(settings: Settings) -> Iterator[_Record]:
    """The record, held by this process."""
    settings.data_root.mkdir(parents=True, exist_ok=True)
    with hold_file(settings.data_root / ".trusted-weights.lock", wait=True):
        yield _Record(settings.trusted_hashes)
