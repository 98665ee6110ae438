"""Weights and data sets from a Hugging Face hub: pinned, verified, and never waited for in vain.

The only file of the project that talks to a hub, and only through ``huggingface_hub``. A commit that lies
complete in the cache costs no request; every file is hashed before use, cached or new. The library retries
and waits on its own terms (a listing has no time limit, a ``Retry-After`` is slept out in full), so each call
into it is watched from outside and given up once nothing more arrives.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from model.files import sha256_file
from ops.threads import in_daemon_thread

if TYPE_CHECKING:
    from datasets import DatasetDict
    from huggingface_hub import DatasetInfo, ModelInfo

T = TypeVar("T")
Count = Callable[[], int]

ANSWER_SECONDS = 10.0  # for the answer to one question, such as "which files has this revision?"
PAUSES = (1.0, 3.0)  # between the tries of a question: three tries, 34 s when the hub hangs
STALL_SECONDS = 45.0  # without a new byte, then a download is given up (the library writes 10 MB at a time)

DEFAULT_DATASET = "HuggingFaceH4/CodeAlpaca_20K"
PINNED_WEIGHTS: dict[str, tuple[str, str]] = {
    "124m": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "355m": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "774m": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "1558m": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}

# What may be fetched. Pickles (.bin, .pt, .pkl) are not among it.
_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
            "merges.txt", "model.safetensors")  # fmt: skip
_CARDS = ("README.md", ".huggingface.yaml")  # they say which table belongs to which split
_TABLES = tuple(f"*.{kind}{gz}" for kind in ("parquet", "json", "jsonl", "csv", "txt") for gz in ("", ".gz"))
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # the hub's, of a file in git or in LFS


class HubError(RuntimeError):
    """The hub did not give what was asked for; the message says what, why, and the local way out."""


class HubAwayError(HubError):
    """The hub gave no answer, or one that may change: what is cached still counts."""


class _Stalled(Exception):
    """Nothing arrived for too long."""


@dataclass(frozen=True)
class HubSnapshot:
    """Verified files of one commit: ``files`` maps each name in ``path`` to its sha256."""

    path: Path
    commit: str
    files: dict[str, str]


def fetch_weights(
    repo_id: str, revision: str, cache_dir: Path | None, local_option: str = "weights_dir"
) -> HubSnapshot:
    """Return the config, ``model.safetensors`` and tokenizer of ``repo_id`` at ``revision``.

    Weights in shards are not supported (the GPT-2 repositories have one file). ``cache_dir=None`` means the
    library's own cache; ``local_option`` is the flow parameter that an error points to.

    Raises:
        HubError: the hub is away and no complete copy is cached, the repository lacks something, or a file
            came with the wrong content twice.
    """
    folder, hashes = _Repo(repo_id, "model", revision, cache_dir, local_option, _WEIGHTS).fetch()
    files = {name: known if len(known) == 64 else sha256_file(folder / name) for name, known in hashes.items()}
    return HubSnapshot(folder, folder.name, files)


def fetch_dataset(
    dataset_id: str, revision: str | None, cache_dir: Path | None, local_option: str = "dataset"
) -> tuple[DatasetDict, str]:
    """Return all splits of ``dataset_id`` at ``revision`` (None: its main branch) and the commit behind it.

    The tables of the repository, all of them, are fetched and verified here and then loaded from disk.
    ``load_dataset(dataset_id, revision=...)`` would not do: whenever the hub fails, it takes the newest
    commit that it has cached, whatever the revision, and it keeps its downloads outside ``cache_dir``.

    Raises:
        HubError: as in `fetch_weights`, or the files cannot be read as one data set.
    """
    repo = _Repo(dataset_id, "dataset", revision, cache_dir, local_option, _CARDS + _TABLES)
    folder, _ = repo.fetch()

    from datasets import load_dataset  # takes a second, which a failure need not wait for

    arrow = str(cache_dir / "arrow") if cache_dir else None  # away from the downloads
    try:
        return load_dataset(str(folder), cache_dir=arrow), folder.name
    except Exception as error:
        raise repo.error(f"{type(error).__name__} while reading its files: {error}") from error


@dataclass(frozen=True)
class _Repo:
    """The wanted files of one revision of a repository."""

    repo_id: str
    repo_type: str
    revision: str | None
    cache_dir: Path | None
    local_option: str
    patterns: tuple[str, ...]

    def fetch(self) -> tuple[Path, dict[str, str]]:
        """Return the folder, named by the commit, and the hub's hash of each file's content."""
        pinned = re.fullmatch("[0-9a-f]{40}", self.revision or "")
        if pinned and (found := self.cached()):
            return found
        try:
            info = self.ask(self.info)
        except HubAwayError:
            if not pinned and (found := self.cached()):
                return found
            raise
        files = {file.rfilename: file for file in info.siblings or ()}
        wanted = self.wanted(files)
        if missing := self.missing(wanted):
            raise self.error(f"the repository has no {missing}")
        hashes = {}
        for name in wanted:
            lfs = files[name].lfs
            hashes[name] = (lfs.sha256 if lfs else files[name].blob_id) or ""
            if not _HASH.fullmatch(hashes[name]):
                raise self.error(f"the hub gives no hash of {name}")
            folder = self.download(name, hashes[name], str(info.sha))
        # All files are there: this only notes the list of files, and the commit of a branch, in the cache.
        # With them a later call knows a complete copy when it cannot ask.
        self.attempt(partial(self.snapshot, local_files_only=False), STALL_SECONDS, "the list of files")
        return folder, hashes

    def info(self) -> ModelInfo | DatasetInfo:
        from huggingface_hub import HfApi

        ask = HfApi().dataset_info if self.repo_type == "dataset" else HfApi().model_info
        return ask(self.repo_id, revision=self.revision, files_metadata=True, timeout=ANSWER_SECONDS)

    def snapshot(self, local_files_only: bool) -> Path:
        from huggingface_hub import get_cached_repo_tree, snapshot_download

        path = snapshot_download(
            self.repo_id, repo_type=self.repo_type, revision=self.revision, cache_dir=self.cache_dir,
            allow_patterns=list(self.patterns), local_files_only=local_files_only,
        )  # fmt: skip
        if local_files_only and self.repo_type == "dataset":
            # The library takes a copy without a list of its files (another program filled the cache) for
            # complete. Of weights it is known what must be there; for a data set this raises.
            commit = Path(path).name
            get_cached_repo_tree(self.repo_id, repo_type="dataset", revision=commit, cache_dir=self.cache_dir)
        return Path(path)

    def cached(self) -> tuple[Path, dict[str, str]] | None:
        """Return a complete cached copy, verified now; damaged files are removed from the cache."""
        try:
            folder = self.attempt(partial(self.snapshot, local_files_only=True), STALL_SECONDS)
        except HubAwayError:
            return None
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = self.wanted(path.relative_to(folder).as_posix() for path in paths)
        hashes = {name: blob for name in names if (blob := _name_of_blob(folder / name))}
        if self.missing(names) or len(hashes) < len(names):
            return None
        damaged = [name for name, expected in hashes.items() if _hash(folder / name, expected) != expected]
        for name in damaged:
            self.remove(folder / name)
        return None if damaged else (folder, hashes)

    def download(self, name: str, expected: str, commit: str) -> Path:
        """Bring a file into the cache unless it is there, verify it, and fetch a wrong one once more."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils.tqdm import tqdm

        received = 0
        blobs = self.root() / repo_folder_name(repo_id=self.repo_id, repo_type=self.repo_type) / "blobs"

        class Counter(tqdm):
            def update(self, n: float | None = 1) -> None:
                nonlocal received
                received += int(n or 0)  # negative when the library starts over
                super().update(n)

        def arrived() -> int:
            # Part files count too: another process may be fetching this very file while we wait for its lock.
            return received + sum(part.st_size for part in _parts(blobs, expected).values())

        fetch = partial(
            hf_hub_download, self.repo_id, name, repo_type=self.repo_type, revision=commit,
            cache_dir=self.cache_dir, etag_timeout=ANSWER_SECONDS, tqdm_class=Counter,
        )  # fmt: skip
        try:
            for _ in range(2):
                path = Path(self.attempt(fetch, STALL_SECONDS, name, arrived))
                if (actual := _hash(path, expected)) == expected:
                    return path.parents[name.count("/")]
                self.remove(path)
        finally:
            # Given up just now, or by a process that was killed: the library never comes back to them.
            for part, stat in _parts(blobs, expected).items():
                if time.time() - stat.st_mtime > STALL_SECONDS / 2:
                    part.unlink(missing_ok=True)
        raise self.error(f"{name} came twice with hash {actual} instead of {expected}, and was not kept")

    def ask(self, question: Callable[[], T]) -> T:
        from huggingface_hub import is_offline_mode

        for pause in () if is_offline_mode() else PAUSES:
            try:
                return self.attempt(question, ANSWER_SECONDS)
            except HubAwayError:
                time.sleep(pause)
        return self.attempt(question, ANSWER_SECONDS)

    def attempt(self, call: Callable[[], T], limit: float, file: str = "", arrived: Count = int) -> T:
        """Call the library, watched; whatever it raises becomes a `HubError`."""
        try:
            return _watched(call, limit, arrived)
        except Exception as error:
            # "Not in the cache either" is caused by what happened. Texts are picked and the chain is cut,
            # because URLs in it can hold a password or a signature.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            name = type(cause).__name__.lstrip("_")
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            kind: type[HubError] = HubAwayError
            detail = f"HTTP {status}" if status else getattr(cause, "strerror", None)
            if name in ("ConnectError", "Stalled", "HFValidationError"):
                detail = str(cause)
            if name == "HFValidationError" or (400 <= status < 500 and status not in (408, 429)):
                kind = HubError
            reason = f"{name} ({detail})" if detail else name
            if file:
                reason = f"{file}: {reason}"
            elif kind is HubAwayError:
                reason += ", and no complete copy is cached"
            raise self.error(reason, kind) from None

    def error(self, reason: str, kind: type[HubError] = HubError) -> HubError:
        from huggingface_hub import constants

        url = urlsplit(constants.ENDPOINT)
        return kind(
            f"Could not fetch the {self.repo_type} {self.repo_id} at revision {self.revision or 'main'} from "
            f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}: {reason}. "
            f"A local copy can be given as {self.local_option}."
        )

    def root(self) -> Path:
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()

    def remove(self, path: Path) -> None:
        """Remove a file of a snapshot, its blob, and the content in the store for Xet that it may link to."""
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        for part in map(os.path.abspath, (path.resolve(), blob, path)):
            if Path(part).is_relative_to(self.root()):  # what somebody linked to from here is theirs
                Path(part).unlink(missing_ok=True)

    def wanted(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.patterns)]

    def missing(self, names: list[str]) -> str:
        """Name what a usable copy lacks."""
        if self.repo_type == "dataset":
            return "" if set(names).difference(_CARDS) else "table (parquet, json, csv or text)"
        tokenizer = {"tokenizer.json"} if "tokenizer.json" in names else {"vocab.json", "merges.txt"}
        return ", ".join(sorted({"config.json", "model.safetensors", *tokenizer}.difference(names)))


def _watched(call: Callable[[], T], limit: float, arrived: Count) -> T:
    """Run ``call`` in a thread, and raise `_Stalled` when ``arrived`` has not grown for ``limit`` seconds.

    The thread is then left behind. It keeps no process alive (a daemon), and what it may still put into the
    cache is verified before use like everything else.
    """
    future = in_daemon_thread(call, "hub")
    most, since = arrived(), time.monotonic()
    while not wait([future], timeout=0.2).done:
        if (now := arrived()) > most:
            most, since = now, time.monotonic()
        elif time.monotonic() - since > limit:
            raise _Stalled(f"nothing arrived for {limit:g} s")
    return future.result()


def _parts(blobs: Path, expected: str) -> dict[Path, os.stat_result]:
    """Return the part files of one blob, whichever process writes them."""
    parts = {}
    for path in blobs.glob(f"{expected}.*.incomplete"):
        with suppress(FileNotFoundError):  # finished and renamed since it was listed
            parts[path] = path.stat()
    return parts


def _name_of_blob(path: Path) -> str | None:
    """Return the name of the blob that a file of a snapshot links to, which is the hub's hash of its content.

    One link only: a blob may itself link into the cache's store for Xet, where files are named by a hash that
    looks like a sha256 and is none. A cache without links (Windows) has no such names.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _HASH.fullmatch(name) else None


def _hash(path: Path, like: str) -> str:
    """Hash content as the hub does: sha256 (LFS), or else, where ``like`` has 40 digits, its git blob id."""
    if len(like) == 40:  # small files only
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sha256_file(path)
