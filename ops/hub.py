"""Weights and data sets from a Hugging Face hub, pinned to a commit, verified, and with bounded waiting.

This file and ``ops/hub_push.py`` are the only ones that talk to a hub, and only through ``huggingface_hub``. A commit
that is complete in the cache needs no request. Every file is hashed before use, cached or new. The library's own
waiting is unbounded (a listing has no time limit, a ``Retry-After`` is slept out in full), so each call runs in a
thread, and is given up when no more bytes arrive.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from model.data.formats import READERS, SUFFIXES
from model.files import leads_outside, sha256_file
from ops.hub_answers import refuse_unsafe_answers
from ops.hub_blobs import HASH, blob_hash, name_of_blob, part_files
from ops.threads import in_daemon_thread

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, ModelInfo

T = TypeVar("T")
ByteCount = Callable[[], int]

ANSWER_SECONDS = 10.0  # time limit of one query, such as "which files has this revision?"
PAUSES = (1.0, 3.0)  # seconds between the attempts of a query: three attempts, 34 s if the hub hangs
STALL_SECONDS = 45.0  # a download without a new byte for so long is given up (the library writes 10 MB at a time)

DEFAULT_DATASET = "HuggingFaceH4/CodeAlpaca_20K"
PINNED_WEIGHTS: dict[str, tuple[str, str]] = {
    "124m": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "355m": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "774m": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "1558m": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}

# File patterns that may be fetched: no pickles (.bin, .pt, .pkl).
_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
            "merges.txt", "model.safetensors")  # fmt: skip
_CARDS = ("README.md",)  # it may name configurations and the files of splits
_TABLES = tuple(f"*{suffix}" for suffix in SUFFIXES)


class HubError(RuntimeError):
    """A repository could not be fetched; the message says why, and which parameter takes a local copy."""


class HubAwayError(HubError):
    """The hub did not answer, or answered with an error that may be temporary: a cached copy may be used."""


class _Stalled(Exception):
    """No byte arrived within the time limit."""


@dataclass(frozen=True)
class HubSnapshot:
    """Verified files of one commit; ``files`` maps each file name in the folder ``path`` to its sha256."""

    path: Path
    commit: str
    files: dict[str, str]


def fetch_weights(
    repo_id: str, revision: str, cache_dir: Path | None, local_option: str = "weights_dir"
) -> HubSnapshot:
    """Return the config, ``model.safetensors`` and tokenizer of ``repo_id`` at ``revision``.

    Weights in shards are not supported (the GPT-2 repositories have one file).

    Args:
        cache_dir: folder of the cache; None for the library's own.
        local_option: the flow parameter that an error names as the remedy.

    Raises:
        HubError: the hub does not answer and no complete copy is cached, the repository lacks a needed file, or a
            file was downloaded with the wrong content twice.
    """
    folder, hashes = _Repo(repo_id, "model", revision, cache_dir, local_option, _WEIGHTS).fetch()
    files = {name: known if len(known) == 64 else sha256_file(folder / name) for name, known in hashes.items()}
    return HubSnapshot(folder, folder.name, files)


def fetch_dataset(
    dataset_id: str, revision: str | None, cache_dir: Path | None, local_option: str = "dataset"
) -> tuple[Path, str]:
    """Fetch and verify the tables and the card of ``dataset_id`` at ``revision`` (None: its main branch).

    ``datasets.load_dataset`` is not used. When the hub fails, ``load_dataset(id, revision=...)`` loads the newest
    cached commit, whatever the revision; and ``load_dataset(folder)`` obeys a card that names files outside the
    folder, or URLs. ``model.data.layout`` reads the folder by the same rules, and nothing outside it.

    Args:
        cache_dir, local_option: as in ``fetch_weights``.

    Returns:
        The folder, and the commit's hash.

    Raises:
        HubError: as in ``fetch_weights``.
    """
    folder, _ = _Repo(dataset_id, "dataset", revision, cache_dir, local_option, _CARDS + _TABLES).fetch()
    return folder, folder.name


@dataclass(frozen=True)
class _Repo:
    """The needed files of one revision of a repository.

    Attributes:
        repo_id: owner and name.
        repo_type: "model" or "dataset".
        revision: a commit, branch or tag; None for the main branch.
        cache_dir: folder of the cache; None for the library's own.
        local_option: the flow parameter that an error names as the remedy.
        patterns: patterns of the needed files' names.
    """

    repo_id: str
    repo_type: str
    revision: str | None
    cache_dir: Path | None
    local_option: str
    patterns: tuple[str, ...]

    def fetch(self) -> tuple[Path, dict[str, str]]:
        """Return the folder, whose name is the commit, and the hub's hash of each file by its name."""
        if leads_outside(self.revision or ""):  # the library keeps a file of that name
            raise self.error("no revision of git has such a name")
        refuse_unsafe_answers()
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
        if unsafe := next(filter(leads_outside, files), None):
            raise self.error(f"the hub names the file {unsafe!r}, which is outside the repository")
        wanted = self.wanted(files)
        if missing := self.missing(wanted):
            raise self.error(f"the repository has no {missing}")
        hashes = {}
        for name in wanted:
            lfs = files[name].lfs
            hashes[name] = (lfs.sha256 if lfs else files[name].blob_id) or ""
            if not HASH.fullmatch(hashes[name]):
                raise self.error(f"the hub gives no hash of {name}")
            folder = self.download(name, hashes[name], str(info.sha))
        # All files are there. This call only records the list of files, and the commit of a branch, in the cache, so
        # that a later call without the hub can tell that the copy is complete.
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
            # The library takes a copy for complete if its list of files is missing (another program filled the
            # cache). For weights `missing` checks the names; for a data set this call raises if there is no list.
            commit = Path(path).name
            get_cached_repo_tree(self.repo_id, repo_type="dataset", revision=commit, cache_dir=self.cache_dir)
        return Path(path)

    def cached(self) -> tuple[Path, dict[str, str]] | None:
        """Return a complete cached copy, verified by its hashes; damaged files are removed from the cache."""
        try:
            folder = self.attempt(partial(self.snapshot, local_files_only=True), STALL_SECONDS)
        except HubAwayError:
            return None
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = self.wanted(path.relative_to(folder).as_posix() for path in paths)
        hashes = {name: blob for name in names if (blob := name_of_blob(folder / name))}
        if self.missing(names) or len(hashes) < len(names):
            return None
        damaged = [name for name, expected in hashes.items() if blob_hash(folder / name, expected) != expected]
        for name in damaged:
            self.remove(folder / name)
        return None if damaged else (folder, hashes)

    def download(self, name: str, expected: str, commit: str) -> Path:
        """Download a file unless it is cached, and verify it; a wrong file is downloaded once more."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils.tqdm import tqdm

        received = 0
        blobs = self.root() / repo_folder_name(repo_id=self.repo_id, repo_type=self.repo_type) / "blobs"

        class Counter(tqdm):
            def update(self, n: float | None = 1) -> None:
                nonlocal received
                received += int(n or 0)  # negative when the library restarts the download
                super().update(n)

        def arrived() -> int:
            # Part files count too: another process may be downloading this file while this one waits for its lock.
            return received + sum(part.st_size for part in part_files(blobs, expected).values())

        fetch = partial(
            hf_hub_download, self.repo_id, name, repo_type=self.repo_type, revision=commit,
            cache_dir=self.cache_dir, etag_timeout=ANSWER_SECONDS, tqdm_class=Counter,
        )  # fmt: skip
        try:
            for _ in range(2):
                path = Path(self.attempt(fetch, STALL_SECONDS, name, arrived))
                if (actual := blob_hash(path, expected)) == expected:
                    return path.parents[name.count("/")]
                self.remove(path)
        finally:
            # Part files of a download that was given up, here or by a killed process: the library never reuses them.
            for part, stat in part_files(blobs, expected).items():
                if time.time() - stat.st_mtime > STALL_SECONDS / 2:
                    part.unlink(missing_ok=True)
        raise self.error(f"{name} was downloaded twice with hash {actual} instead of {expected}, and was not kept")

    def ask(self, query: Callable[[], T]) -> T:
        """Send a query, again after each of ``PAUSES`` while the hub does not answer."""
        from huggingface_hub import is_offline_mode

        for pause in () if is_offline_mode() else PAUSES:
            try:
                return self.attempt(query, ANSWER_SECONDS)
            except HubAwayError:
                time.sleep(pause)
        return self.attempt(query, ANSWER_SECONDS)

    def attempt(self, call: Callable[[], T], limit: float, file: str = "", arrived: ByteCount = lambda: 0) -> T:
        """Call the library with a time limit; whatever it raises becomes a `HubError`."""
        try:
            return _watched(call, limit, arrived)
        except Exception as error:
            # The library's FileNotFoundError, "not in the cache either", has the real error as its cause. Only parts
            # of the text are used and the chain is cut, because URLs in it can hold a password or a signature.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            name = type(cause).__name__.lstrip("_")
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            kind: type[HubError] = HubAwayError
            detail = f"HTTP {status}" if status else getattr(cause, "strerror", None)
            if name in ("ConnectError", "Stalled", "HFValidationError", "UnsafeAnswerError"):
                detail = str(cause)
            definite = name in ("HFValidationError", "UnsafeAnswerError")
            if definite or (400 <= status < 500 and status not in (408, 429)):
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
            f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}: {reason}; "
            f"a local copy can be given as {self.local_option}"
        )

    def root(self) -> Path:
        from huggingface_hub import constants

        return Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()

    def remove(self, path: Path) -> None:
        """Remove a file of a snapshot, its blob, and the file in the store for Xet to which the blob may link."""
        blob = path.parent / os.readlink(path) if path.is_symlink() else path
        for part in map(os.path.abspath, (path.resolve(), blob, path)):
            if Path(part).is_relative_to(self.root()):  # a link may lead to a user's file outside the cache
                Path(part).unlink(missing_ok=True)

    def wanted(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.patterns)]

    def missing(self, names: list[str]) -> str:
        """The needed files that are not among the names; empty if the copy is complete."""
        if self.repo_type == "dataset":
            return "" if set(names).difference(_CARDS) else f"table ({', '.join(READERS)})"
        tokenizer = {"tokenizer.json"} if "tokenizer.json" in names else {"vocab.json", "merges.txt"}
        return ", ".join(sorted({"config.json", "model.safetensors", *tokenizer}.difference(names)))


def _watched(call: Callable[[], T], limit: float, arrived: ByteCount) -> T:
    """Run ``call`` in a daemon thread, and raise `_Stalled` if ``arrived()`` has not grown for ``limit`` seconds.

    The thread then goes on. It does not keep the process alive, and files that it may still write into the cache are
    verified before use like all others.
    """
    future = in_daemon_thread(call, "hub")
    most, grown_at = arrived(), time.monotonic()
    while not wait([future], timeout=0.2).done:
        if (now := arrived()) > most:
            most, grown_at = now, time.monotonic()
        elif time.monotonic() - grown_at > limit:
            raise _Stalled(f"nothing arrived for {limit:g} s")
    return future.result()
