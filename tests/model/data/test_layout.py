"""Which files are rows, and of which split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.data.layout import find_layout, find_splits


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _found(folder: Path, config: str | None = None) -> dict[str, list[str]]:
    splits = find_layout(folder, config).splits
    return {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in splits.items()}


def test_folder_is_split_by_file_names(tmp_path: Path) -> None:
    """File names decide the split as on the hub; files of other types are ignored."""
    names = ["train-00000.jsonl", "more.csv", "Test.parquet", "validation.json", "dev2.jsonl", "README.md"]
    for name in names:
        (tmp_path / name).touch()
    found = {split: [path.name for path in paths] for split, paths in find_splits(tmp_path).items()}
    assert found == {
        "train": ["more.csv", "train-00000.jsonl"],
        "test": ["Test.parquet"],
        "validation": ["dev2.jsonl", "validation.json"],
    }


def test_single_file_is_train(tmp_path: Path) -> None:
    """A single file is train, even if its name is test.jsonl."""
    (tmp_path / "test.jsonl").touch()
    assert find_splits(tmp_path / "test.jsonl") == {"train": [tmp_path / "test.jsonl"]}


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    """Each way of giving no data has its own message."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_splits(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no file"):
        find_splits(tmp_path)
    (tmp_path / "test.csv").touch()
    with pytest.raises(ValueError, match="holds no training file, only test"):
        find_splits(tmp_path)
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ValueError, match=r"rows\.txt is none of"):
        find_splits(tmp_path / "rows.txt")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("alpaca_test.jsonl", "test"),
        ("alpaca-validation.jsonl", "validation"),
        ("my.val.jsonl.gz", "validation"),
        ("eval1.parquet", "test"),
        ("00-dev.csv", "validation"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("test/part-0.parquet", "test"),
        ("validation/train_like.jsonl", "validation"),
        ("python/test/rows.jsonl", "test"),
        ("developers.jsonl", "train"),
        ("testing_frameworks.jsonl", "train"),
        ("values.jsonl", "train"),
        ("latest.jsonl", "train"),
        ("contest.jsonl", "train"),
        ("devices/rows.jsonl", "train"),
    ],
)
def test_a_word_counts_where_it_is_bounded(tmp_path: Path, name: str, split: str) -> None:
    """As in datasets: by an end of the name, a digit or a separator; a folder called like a split comes first."""
    _touch(tmp_path, "rows.jsonl", name)
    assert name in _found(tmp_path)[split]


def test_a_name_of_two_splits_is_refused(tmp_path: Path) -> None:
    """Neither is guessed."""
    _touch(tmp_path, "train_test.jsonl")
    with pytest.raises(ValueError, match="'train_test' names the splits train and test: rename it"):
        find_splits(tmp_path)


def test_hidden_files_and_descriptions_are_no_data(tmp_path: Path) -> None:
    """Backups, caches, and what datasets writes beside its tables."""
    _touch(tmp_path, "train.jsonl", ".train-backup.jsonl", "_old.jsonl", ".cache/rows.jsonl", "_tmp/rows.jsonl")
    _touch(tmp_path, "dataset_infos.json", "dataset_info.json", "config.json", "data/dataset_dict.json")
    assert _found(tmp_path) == {"train": ["train.jsonl"]}


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    """The shards that state.json lists, by split; a cache of a map that was left there is no data."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": str(i), "completion": "c"} for i in range(4)])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    _touch(tmp_path, "set/train/cache-1234.arrow")
    assert _found(tmp_path / "set") == {
        "test": ["test/data-00000-of-00001.arrow"],
        "train": ["train/data-00000-of-00001.arrow"],
    }
    (tmp_path / "set" / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json is not what save_to_disk writes"):
        find_splits(tmp_path / "set")


def _card(folder: Path, *lines: str) -> None:
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "Text.", ""]))


def test_configurations_of_a_card(tmp_path: Path) -> None:
    """One must be chosen where there are several; the message names them."""
    _touch(tmp_path, "python/train.jsonl", "java/train.jsonl", "other.jsonl")
    entries = [
        "- config_name: python",
        "  data_files: python/train.jsonl",
        "- config_name: java",
        "  data_files: java/*",
    ]
    _card(tmp_path, "configs:", *entries)
    with pytest.raises(ValueError, match="has the configurations python, java: choose one with dataset_config"):
        find_splits(tmp_path)
    assert _found(tmp_path, "java") == {"train": ["java/train.jsonl"]}
    with pytest.raises(ValueError, match=r"names no configuration 'c' .*only python, java"):
        find_layout(tmp_path, "c")
    _card(tmp_path, "configs:", *entries, "  default: true")
    assert _found(tmp_path) == {"train": ["java/train.jsonl"]}


def test_splits_of_a_card(tmp_path: Path) -> None:
    """Those named train, validation and test are used, with any ending; others are left out, and named."""
    _touch(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    named = {"train_sft": "a", "test": "b", "held": "c"}
    files = [f"  - split: {split}\n    path: {name}.jsonl" for split, name in named.items()]
    _card(tmp_path, "configs:", "- config_name: default", "  data_files:", *files)
    layout = find_layout(tmp_path)
    assert _found(tmp_path) == {"train": ["a.jsonl"], "test": ["b.jsonl"]}
    assert layout.left_out == ["the split held (c.jsonl): only train, validation and test are used"]


@pytest.mark.parametrize(
    "pattern",
    [
        "/etc/passwd",
        "../secret.jsonl",
        "data/../../secret.jsonl",
        "https://evil.example/rows.jsonl",
        "hf://x/y.jsonl",
    ],
)
@pytest.mark.parametrize("form", ["  data_files: '{}'", "  data_files: ['{}']", "  data_files: {{train: '{}'}}"])
def test_a_card_that_leads_outside_is_refused(tmp_path: Path, pattern: str, form: str) -> None:
    """Absolute paths, ``..`` and URLs: nothing outside the folder is ever read."""
    (tmp_path / "secret.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}))
    folder = tmp_path / "set"
    _touch(folder, "train.jsonl")
    _card(folder, "configs:", "- config_name: default", form.format(pattern))
    with pytest.raises(ValueError, match="which is outside the data set: only files of the data set are read"):
        find_splits(folder)


def test_a_data_dir_that_leads_outside_is_refused(tmp_path: Path) -> None:
    """The folder of a configuration likewise."""
    _touch(tmp_path, "set/train.jsonl", "other/train.jsonl")
    _card(tmp_path / "set", "configs:", "- config_name: default", "  data_dir: ../other")
    with pytest.raises(ValueError, match="outside the data set"):
        find_splits(tmp_path / "set")


def test_a_pattern_without_a_file_is_named(tmp_path: Path) -> None:
    """The card promises what is not there."""
    _touch(tmp_path, "train.jsonl")
    _card(tmp_path, "configs:", "- config_name: default", "  data_files: absent/*.jsonl")
    with pytest.raises(ValueError, match=r"names 'absent/\*\.jsonl', and no such file"):
        find_splits(tmp_path)


@pytest.mark.parametrize("name", ["test.jsonl", "rows.parquet", "test"])
def test_a_link_that_leads_to_nothing(tmp_path: Path, name: str) -> None:
    """MediSwarm#481: data on a disk that is not mounted would be missing without a word."""
    _touch(tmp_path, "train.jsonl")
    (tmp_path / name).symlink_to("/no/such/disk/" + name)
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is a link to /no/such/disk/{name}, which does not exist here"
    ):
        find_splits(tmp_path)


def test_other_links_that_lead_to_nothing_do_not_matter(tmp_path: Path) -> None:
    """They are not data."""
    _touch(tmp_path, "train.jsonl")
    for name in ("notes.txt", ".hidden.jsonl", "_old"):
        (tmp_path / name).symlink_to("/no/such/disk")
    assert _found(tmp_path) == {"train": ["train.jsonl"]}


def test_a_folder_is_read_once(tmp_path: Path) -> None:
    """Links to a folder beside or above, as latest -> v2, would repeat its rows; links elsewhere are followed."""
    _touch(tmp_path, "set/v2/rows.jsonl", "elsewhere/more.jsonl")
    folder = tmp_path / "set"
    for name, target in (("latest", "v2"), ("above", "."), ("v2/again", ".."), ("linked", "../elsewhere")):
        (folder / name).symlink_to(target)
    assert _found(folder) == {"train": ["linked/more.jsonl", "v2/rows.jsonl"]}
    left_out = find_layout(folder).left_out
    assert {line.split(",")[0] for line in left_out} == {
        str(folder / name) for name in ("latest", "above", "v2/again")
    }


@pytest.mark.parametrize("pattern", ["*t" * 60, "**" * 60 + "x", "**/*" * 40 + "x"])
def test_a_pattern_with_many_stars_ends(tmp_path: Path, pattern: str) -> None:
    """As a regular expression it would try for years."""
    _touch(tmp_path, f"{'t' * 200}.jsonl")
    _card(tmp_path, "configs:", "- config_name: default", f"  data_files: '{pattern}'")
    with pytest.raises(ValueError, match="and no such file"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]),
        ("*", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]),  # a folder stands for what is in it
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]),
        ("b/**/e.jsonl", ["b/d/e.jsonl"]),
        ("b/**/c.jsonl", ["b/c.jsonl"]),
        ("b/?.jsonl", ["b/c.jsonl"]),
        ("b/*/*", ["b/d/e.jsonl"]),
        ("b", ["b/c.jsonl", "b/d/e.jsonl"]),
    ],
)
def test_patterns_of_a_card(tmp_path: Path, pattern: str, found: list[str]) -> None:
    _touch(tmp_path, "a.jsonl", "b/c.jsonl", "b/d/e.jsonl")
    _card(tmp_path, "configs:", "- config_name: default", f"  data_files: '{pattern}'")
    assert _found(tmp_path) == {"train": found}


BOMB = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]


@pytest.mark.parametrize(
    "line",
    [
        "configs: *a29",
        "configs: [{config_name: *a29, data_files: x}]",
        "configs: [{data_dir: *a29, data_files: x}]",
        "configs: [{data_files: [{split: *a29, path: x}]}]",
        "configs: [{data_files: {train: *a29}}]",
    ],
)
def test_a_card_whose_text_never_ends_is_refused(tmp_path: Path, line: str) -> None:
    """Aliases of aliases: the list has 9**29 entries, and its text would fill any memory."""
    _touch(tmp_path, "train.jsonl")
    _card(tmp_path, *BOMB, line)
    with pytest.raises(ValueError, match=r"README\.md"):
        find_splits(tmp_path)


@pytest.mark.parametrize("head", ["a: !!timestamp x", "a: !!bool x", "a: 2001-99-99", "[" * 5000, "a: 1\na: 2"])
def test_a_card_that_cannot_be_read_is_named(tmp_path: Path, head: str) -> None:
    _touch(tmp_path, "train.jsonl")
    _card(tmp_path, head)
    with pytest.raises(ValueError, match=r"the head of .*README\.md is not YAML: "):
        find_splits(tmp_path)


def test_a_card_of_empty_lines_is_read_at_once(tmp_path: Path) -> None:
    """The search for its head takes time that grows with its length, not with the square of it."""
    _touch(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text("---" + "\n" * 200_000)
    assert _found(tmp_path) == {"train": ["train.jsonl"]}


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "{}", '{"_data_files": [3]}', '{"_data_files": 1}'])
def test_a_damaged_state_of_save_to_disk_is_named(tmp_path: Path, content: str) -> None:
    _touch(tmp_path, "data-00000-of-00001.arrow")
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is not what save_to_disk writes"):
        find_splits(tmp_path)
