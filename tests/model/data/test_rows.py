"""Rows: every file type, every schema, every reason to drop a row; the draw of splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from model.data.rows import (
    READERS,
    SCHEMAS,
    SUFFIXES,
    UNUSABLE,
    UnusableRow,
    find_splits,
    fraction,
    normalize_row,
    prompt_key,
    read_records,
    row_key,
)

ROWS = [
    {"prompt": "Add 1", "completion": "x + 1\n"},
    {"prompt": 'Quote "this",\nplease', "completion": "NA"},
    {"prompt": "Ünïcode ☃", "completion": "001"},
]


# Writes ROWS as each type of file. A new entry of READERS needs one here.
WRITERS: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS)),
    ".json": lambda path: path.write_text(json.dumps(ROWS)),
    ".parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    ".csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
}
# Records of each schema with the prompt that each becomes; the completion is "c". A new entry of SCHEMAS needs one.
RECORDS: dict[tuple[str, ...], list[tuple[dict[str, Any], str]]] = {
    ("prompt", "completion"): [({"prompt": "Add\n1", "completion": "c"}, "Add\n1")],
    ("instruction", "output"): [
        ({"instruction": "Add", "input": "1", "output": "c"}, "Add\n1"),
        ({"instruction": "Add", "input": "", "output": "c"}, "Add"),
        ({"instruction": "Add", "input": None, "output": "c"}, "Add"),
        ({"instruction": "Add", "output": "c"}, "Add"),
    ],
}


def test_every_format_has_a_sample() -> None:
    """A file type or schema that is added without a sample here fails, and so does a sample without a reader."""
    assert WRITERS.keys() == READERS.keys()
    assert RECORDS.keys() == SCHEMAS.keys()
    assert tuple(READERS) == SUFFIXES


@pytest.mark.parametrize("suffix", READERS)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """Text stays text, in order: pandas would read NA as missing and 001 as 1."""
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert find_splits(path) == {"train": [path]}
    assert [normalize_row(record) for record in read_records(path)] == ROWS


@pytest.mark.parametrize("suffix", READERS)
def test_broken_file_is_named(tmp_path: Path, suffix: str) -> None:
    """An unreadable file is an error with its name; broken lines of a .jsonl are rows to drop."""
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'"\x00{not a file of any kind')
    if suffix == ".jsonl":
        assert [type(record) for record in read_records(path)] == [UnusableRow]
    else:
        with pytest.raises(ValueError, match=rf"rows\{suffix} cannot be read"):
            list(map(normalize_row, read_records(path)))


def test_json_that_is_no_list_is_refused(tmp_path: Path) -> None:
    """A JSON object, such as a dict of columns, is not read as rows."""
    (tmp_path / "rows.json").write_text('{"prompt": ["a"]}')
    with pytest.raises(ValueError, match="not a list of rows"):
        list(read_records(tmp_path / "rows.json"))


@pytest.mark.parametrize("fields", SCHEMAS, ids=" + ".join)
def test_every_schema_becomes_prompt_and_completion(fields: tuple[str, ...]) -> None:
    """The required fields are enough; each has its reason if it is absent or null."""
    for record, prompt in RECORDS[fields]:
        assert normalize_row(record) == {"prompt": prompt, "completion": "c"}
        for field in fields:
            with pytest.raises(UnusableRow, match="missing_field"):
                normalize_row({key: value for key, value in record.items() if key != field})
            with pytest.raises(UnusableRow, match="null_field"):
                normalize_row({**record, field: None})


def test_the_first_schema_wins() -> None:
    """A record with the fields of both schemas is read as prompt + completion, even if these are unusable."""
    other = {"instruction": "i", "output": "o"}
    assert normalize_row({**other, "prompt": "p", "completion": "c"}) == {"prompt": "p", "completion": "c"}
    with pytest.raises(UnusableRow, match="null_field"):
        normalize_row({**other, "prompt": "p", "completion": None})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["prompt", "completion"], "not_an_object"),
        ("text", "not_an_object"),
        (None, "not_an_object"),
        ({"prompt": "p"}, "missing_field"),
        ({"instruction": "i", "completion": "c"}, "missing_field"),
        ({}, "missing_field"),
        ({"prompt": None, "completion": "c"}, "null_field"),
        ({"prompt": "p", "completion": None}, "null_field"),
        ({"prompt": 5, "completion": "c"}, "not_a_string"),
        ({"prompt": "p", "completion": ["c"]}, "not_a_string"),
        ({"instruction": "i", "input": 5, "output": "o"}, "not_a_string"),
        ({"prompt": "p", "completion": ""}, "empty_field"),
        ({"prompt": " \n", "completion": "c"}, "empty_field"),
        ({"prompt": "a\ud800b", "completion": "c"}, "invalid_unicode"),
        ({"instruction": "i", "input": "\udfff", "output": "o"}, "invalid_unicode"),
        (UnusableRow("invalid_json"), "invalid_json"),
    ],
)
def test_unusable_rows_have_a_reason(record: Any, reason: str) -> None:
    """An unusable record gives its reason, and never the text "None"."""
    with pytest.raises(UnusableRow) as caught:
        normalize_row(record)
    assert caught.value.reason == reason
    assert reason in UNUSABLE


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    """A truncated line, invalid UTF-8 and NaN each have their reason; blank lines are skipped, other lines read."""
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "p", "completion": "c"}'
    path.write_bytes(b"\n".join([good, good[:10], b'{"prompt": "\xff\xfe"}', b"", b"  ", b"NaN", good]))
    reasons = []
    for record in read_records(path):
        try:
            reasons.append(normalize_row(record)["prompt"])
        except UnusableRow as error:
            reasons.append(error.reason)
    assert reasons == ["p", "invalid_json", "invalid_unicode", "not_an_object", "p"]


def test_deeply_nested_line_is_one_bad_row(tmp_path: Path) -> None:
    """A line that exceeds the parser's recursion limit is one unusable row."""
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + '\n{"prompt": "p", "completion": "c"}\n')
    first, second = read_records(path)
    assert isinstance(first, UnusableRow)
    assert second == {"prompt": "p", "completion": "c"}


def test_nul_is_text(tmp_path: Path) -> None:
    """A NUL inside a string is kept as a character."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a\\u0000b", "completion": "c"}\n')
    [record] = read_records(tmp_path / "rows.jsonl")
    assert normalize_row(record)["prompt"] == "a\x00b"


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


@pytest.mark.parametrize("same", ["ADD one", "Add  one", " Add\tone\n", "Add \uff4fne"])
def test_similar_prompts_share_a_key(same: str) -> None:
    """Case, white space and Unicode form are ignored, so copies of a held-out prompt are recognised."""
    assert prompt_key(same) == prompt_key("Add one")
    assert prompt_key("Add two") != prompt_key("Add one")


def test_fraction_is_uniform_and_depends_on_all_three(make_rows: Callable[[int], list[dict[str, str]]]) -> None:
    """Shares are as requested, and test, validation and seeds are drawn independently."""
    keys = [prompt_key(str(i)) for i in range(2000)]
    test = [fraction(key, 42, "test") < 0.1 for key in keys]
    validation = [fraction(key, 42, "validation") < 0.1 for key in keys]
    other = [fraction(key, 43, "test") < 0.1 for key in keys]
    for chosen in (test, validation, other):
        assert sum(chosen) == pytest.approx(200, abs=55)  # four standard deviations
    for pair in ((test, validation), (test, other)):
        assert sum(a and b for a, b in zip(*pair, strict=True)) == pytest.approx(20, abs=18)
    assert all(0 <= fraction(key, 1, "x") < 1 for key in keys)


def test_tests_and_family_are_kept() -> None:
    """Rows keep their tests for the pass rate; tests that are not a list of strings make the row unusable."""
    row = {"prompt": "p", "completion": "c", "tests": ["assert f(1) == 2"], "family": "number_add", "more": 1}
    assert normalize_row(row) == {key: row[key] for key in ("prompt", "completion", "tests", "family")}
    assert normalize_row({**row, "family": None})["family"] == "all"
    for bad in ("assert True", [1], {"a": "b"}):
        with pytest.raises(UnusableRow, match="tests_not_strings_in_a_list"):
            normalize_row({**row, "tests": bad})


def test_row_keys_are_of_the_content() -> None:
    """The key changes with any field of the normalised row; schema and unread fields do not matter."""
    row = {"prompt": "p", "completion": "c", "tests": ["assert f(1) == 2"], "family": "all"}
    changes = [{"prompt": "p "}, {"completion": "C"}, {"tests": []}, {"family": "other"}]
    assert len({row_key(row), *(row_key({**row, **change}) for change in changes)}) == 5
    assert row_key(dict(reversed(row.items()))) == row_key(row)
    one = normalize_row({"instruction": "p", "input": "", "output": "c", "id": 7})
    assert row_key(one) == row_key(normalize_row({"prompt": "p", "completion": "c", "id": 8}))
    # Keys are stored in MLflow: their values must never change.
    assert row_key({"prompt": "Add \u2603", "completion": "x + 1\n"}) == 5072156249635746624
