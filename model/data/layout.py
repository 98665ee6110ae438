"""Which files of a folder are rows, and of which split: by names, by the folder's card, or by ``save_to_disk``.

The rules are those of the library ``datasets`` for a folder and for a repository of the hub. The folder's card
(README.md) may name configurations with their files. Unlike in ``datasets``, only files inside the folder are ever
read: a card that points elsewhere is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from model.data.formats import READERS, file_type
from model.files import leads_outside, parse_json, plain_name, read_bytes, shown, shown_bare
from model.yaml_text import parse_yaml

SPLITS = ("train", "validation", "test")
# The words of ``datasets`` for each split, but for "testing", which is a subject as often as a split.
_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|eval|evaluation",
}
# A word counts where it is bounded by an end of the name, a digit, or one of - . _ and space.
_NAMED = {split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", re.I) for split, words in _WORDS.items()}
# Files of these names describe a data set, and hold no rows.
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_CARD = "README.md"


@dataclass(frozen=True)
class Layout:
    """The files of a data set.

    Attributes:
        splits: split -> its files, in the order of their paths.
        left_out: a line for each split of a card, and for each link to a folder, that is not used, with the reason.
    """

    splits: dict[str, list[Path]]
    left_out: list[str] = field(default_factory=list)


def find_splits(source: Path) -> dict[str, list[Path]]:
    """The splits of ``find_layout``."""
    return find_layout(source).splits


def find_layout(source: Path, config: str | None = None) -> Layout:
    """The data files of a file or folder, by split.

    A single file is train. In a folder, at any depth, the split of a file is told by a folder named like a split, by
    the words of its name, or by the words of its folders, in this order; a file without any of them is train.
    Files and folders that begin with ``.`` or ``_`` are no data.

    Args:
        config: a configuration that the folder's card names; None takes the only one, or the default one.

    Raises:
        FileNotFoundError: the path does not exist, the folder has no file of a known type, or a link in it is broken.
        ValueError: a single file of an unknown type, a folder without a training file, a card that names files
            outside the folder, or several configurations without a choice; the message names them.
    """
    if source.is_file():
        if file_type(source) is None:
            raise ValueError(f"{source} is none of {', '.join(READERS)}, compressed by gzip (.gz) or not")
        return Layout({"train": [source]})
    if not source.is_dir():
        wrong = "is neither a file nor a folder" if source.exists() else "does not exist"
        raise FileNotFoundError(f"dataset {source} {wrong}: give a file or folder, or a hub id like owner/name")
    left_out: list[str] = []
    files = sorted(_data_files(source, left_out, set()))
    if not files:
        raise FileNotFoundError(f"dataset folder {source} holds no file of {', '.join(READERS)}")
    entries = _configuration(source, config)
    layout = _by_card(source, files, entries) if entries else Layout(_by_names(source, files))
    layout.left_out.extend(left_out)
    if "train" not in layout.splits:
        raise ValueError(f"dataset folder {source} holds no training file, only {', '.join(layout.splits) or 'none'}")
    return layout


def _data_files(folder: Path, left_out: list[str], visited: set[Path]) -> Iterator[Path]:
    """The files of a known type below a folder, without hidden ones, descriptions, and caches of ``datasets``.

    Args:
        left_out: gets a line for each link to a folder that is read already, such as latest -> v2, or a folder above.
        visited: the folders that were read, without links.

    Raises:
        FileNotFoundError: a link leads to nothing, as to a disk that is not mounted.
    """
    visited.add(folder.resolve())
    shards = _listed_shards(folder)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name)):  # links last
        if path.name.startswith((".", "_")):
            continue
        if path.is_symlink() and not path.exists() and (file_type(path) or not path.suffix):
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path)}, which does not exist here: mount or copy that, or remove "
                "the link"
            )
        if path.is_dir():
            if path.resolve() in visited:
                left_out.append(f"{path}, a link to a folder that is read already")
            else:
                yield from _data_files(path, left_out, visited)
        elif shards is not None and path.suffix == ".arrow" and path.name not in shards:
            continue  # a cache of ``datasets``
        elif file_type(path) and path.name not in _METADATA and path.is_file():
            yield path


def _listed_shards(folder: Path) -> set[str] | None:
    """The files that ``save_to_disk`` lists in state.json; None in another folder.

    Raises:
        ValueError: it lists a file that is missing or outside the folder, or, beside .arrow files, is something else.
    """
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        names = [shard["filename"] for shard in parse_json(read_bytes(state), state)["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not any(folder.glob("*.arrow")):
            return None  # of another program
        raise ValueError(
            f"{state} is not what save_to_disk writes ({shown(error)}): save the data set again"
        ) from error
    for name in names:
        if not (folder / plain_name(name, state)).is_file():
            raise ValueError(f"{state} names {shown_bare(name)}, which is not there: copy the whole folder")
    return set(names)


def _split_of(name: str) -> str | None:
    """The split that a name's words tell; None if it has none.

    Raises:
        ValueError: it has words of two splits.
    """
    found = [split for split, pattern in _NAMED.items() if pattern.search(name)]
    if len(found) > 1:
        raise ValueError(f"{name!r} names the splits {' and '.join(found)}: rename it")
    return found[0] if found else None


def _by_names(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names tell; files whose names tell none are train."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of_path(path.relative_to(folder)) or "train", []).append(path)
    return splits


def _stem(path: Path) -> str:
    """A file's name without its type and .gz."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.stem


def _split_of_path(path: Path) -> str | None:
    """The split of a file: a folder that is called exactly so, else the file's name, else its folders' names."""
    folders = [part.lower() for part in reversed(path.parts[:-1])]
    exact = [split for part in folders for split, words in _WORDS.items() if part in words.split("|")]
    by_words = (_split_of(name) for name in (_stem(path), *folders))
    return exact[0] if exact else next((split for split in by_words if split), None)


def _configuration(folder: Path, wanted: str | None) -> list[tuple[str | None, str]]:
    """The (split, pattern) pairs of a configuration that the folder's card names; none without one.

    Raises:
        ValueError: the card cannot be read, has no such configuration, or several and none is wanted.
    """
    card = folder / _CARD
    configs = [
        each for each in _front_matter(card).get("configs") or [] if "data_files" in each or "data_dir" in each
    ]
    names = [_plain(each, "config_name", card) or "default" for each in configs]
    if wanted is not None and wanted not in names:
        known = ", ".join(names) or "none"
        raise ValueError(f"{card} names no configuration {wanted!r} (dataset_config), only {known[:300]}")
    if not configs:
        return []
    pairs = list(zip(configs, names, strict=True))
    if wanted is not None or len(configs) == 1:
        chosen = [each for each, name in pairs if wanted in (name, None)]
    else:
        chosen = [each for each, _ in pairs if each.get("default")]
        chosen = chosen or [each for each, name in pairs if name == "default"]
    if not chosen:
        raise ValueError(f"{card} has the configurations {', '.join(names)[:300]}: choose one with dataset_config")
    return list(_patterns(chosen[0], card))


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of three dashes; empty without it."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    try:
        loaded = parse_yaml(match[1]) if match else {}
    except ValueError as error:
        raise ValueError(f"the head of {card} is not YAML: {error}") from error
    found = loaded if isinstance(loaded, dict) else {}
    configs = found.get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(each, dict) for each in configs):
        raise ValueError(f"configs in {card} is not a list of configurations")
    return found


def _plain(entry: dict[str, Any], name: str, card: Path) -> str | None:
    """The text of an entry of a card, or a number or date as text; None where there is none.

    Raises:
        ValueError: it is a list or a mapping. Aliases can make one so large that its text never ends.
    """
    value = entry.get(name)
    if isinstance(value, list | dict | set | tuple):
        raise ValueError(f"{name} in {card} is {shown(value)}, where a text is needed")
    return None if value is None else str(value)


def _patterns(config: dict[str, Any], card: Path) -> Iterator[tuple[str | None, str]]:
    """The (split, pattern) pairs of a configuration; each pattern stays inside the folder.

    Raises:
        ValueError: a pattern is absolute, a URL, or leads out of the folder; or the entry has another form.
    """
    given = config.get("data_files", "**")
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    for each in given if isinstance(given, list) else [given]:
        split, paths = (_plain(each, "split", card), each.get("path")) if isinstance(each, dict) else (None, each)
        for pattern in paths if isinstance(paths, list) else [paths]:
            if not isinstance(pattern, str):
                raise ValueError(f"data_files in {card} has {shown(each)}, where a path is needed")
            path = PurePosixPath(_plain(config, "data_dir", card) or "") / pattern
            if re.match(r"\w+:/", pattern) or leads_outside(str(path)):
                raise ValueError(
                    f"{card} names {shown(pattern)}, which is outside the data set: only files of the data set "
                    "are read. Give a local copy without that card"
                )
            pattern = str(path)
            yield split, pattern


def _by_card(folder: Path, files: Sequence[Path], entries: Sequence[tuple[str | None, str]]) -> Layout:
    """The files that the patterns of a card match, by the split that the card or their names tell.

    Raises:
        ValueError: a pattern matches no file.
    """
    layout = Layout({})
    for split, pattern in entries:
        matched = [path for path in files if _matches(path.relative_to(folder), pattern)]
        if not matched:
            raise ValueError(
                f"{folder / _CARD} names {shown(pattern)}, and no such file of {', '.join(READERS)} is there"
            )
        if split is None:
            for name, paths in _by_names(folder, matched).items():
                layout.splits.setdefault(name, []).extend(paths)
        elif known := _split_of(split):
            layout.splits.setdefault(known, []).extend(matched)
        else:
            layout.left_out.append(
                f"the split {split[:100]} ({pattern[:100]}): only train, validation and test are used"
            )
    return layout


def _matches(path: Path, pattern: str) -> bool:
    """Whether a relative path matches a glob pattern, in which ``**`` stands for any folders, or lies below it.

    Without a regular expression: that of a hostile card, with many ``*``, would try for ever.
    """
    text = path.as_posix()
    reached = {0}  # how many characters of the text the pattern may have matched so far
    for part in re.findall(r"\*\*/|\*\*|.", pattern, re.DOTALL):
        behind = range(min(reached, default=len(text)), len(text))
        if part == "**/":
            reached |= {at + 1 for at in behind if text[at] == "/"}
        elif part == "**":
            reached |= {at + 1 for at in behind}
        elif part == "*":
            for at in behind:
                if at in reached and text[at] != "/":
                    reached.add(at + 1)
        else:
            fits = (lambda letter: letter != "/") if part == "?" else part.__eq__
            reached = {at + 1 for at in behind if at in reached and fits(text[at])}
    return any(text[at : at + 1] in ("", "/") for at in reached)
