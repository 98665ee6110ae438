"""Files of every type: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.data.formats import READERS, SUFFIXES, file_type, read_records
from model.data.layout import find_splits
from model.data.schemas import UnusableRow, normalize_row

ROWS = [
    {"prompt": "Add 1", "completion": "x + 1\n"},
    {"prompt": 'Quote "this",\nplease', "completion": "NA"},
    {"prompt": "Ünïcode ☃", "completion": "001"},
]
GOOD = '{"prompt": "p", "completion": "c"}'


def _write_arrow(path: Path) -> None:
    """As datasets' save_to_disk writes a shard."""
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


# Writes ROWS as each type of file. A new entry of READERS needs one here.
SAMPLES: dict[str, Callable[[Path], object]] = {
    ".jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS)),
    ".json": lambda path: path.write_text(json.dumps(ROWS)),
    ".parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    ".csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    ".tsv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t"),
    ".arrow": _write_arrow,
}


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _rows(path: Path) -> list[Any]:
    """Prompts of a file's rows, or the reasons why they cannot be used."""
    found: list[Any] = []
    for record in read_records(path):
        try:
            found.append(normalize_row(record)["prompt"])
        except UnusableRow as error:
            found.append(error.reason)
    return found


def test_every_type_has_a_sample() -> None:
    """A file type that is added without a sample here fails, and so does a sample without a reader."""
    assert SAMPLES.keys() == READERS.keys(), "add the type to SAMPLES"
    assert {file_type(Path(f"rows{suffix}")) for suffix in SUFFIXES} == READERS.keys()


@pytest.mark.parametrize("suffix", READERS)
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    """Text stays text, in order: pandas would read NA as missing and 001 as 1."""
    path = tmp_path / f"rows{suffix}"
    SAMPLES[suffix](path)
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


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """zlib's error is neither an OSError nor a ValueError."""
    path = tmp_path / "rows.jsonl.gz"
    content = bytearray(gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 100))
    content[10:14] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read as \.jsonl: Error -3"):
        list(read_records(path))


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    """It would be for ever."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read as \.jsonl: .*not a file"):
        list(read_records(tmp_path / "rows.jsonl"))


def test_json_that_is_no_list_is_refused(tmp_path: Path) -> None:
    """A JSON object, such as a dict of columns, is not read as rows."""
    (tmp_path / "rows.json").write_text('{"prompt": ["a"]}')
    with pytest.raises(ValueError, match="not a list of rows"):
        list(read_records(tmp_path / "rows.json"))


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


@pytest.mark.parametrize("suffix", READERS)
def test_every_type_is_read_from_gzip(tmp_path: Path, suffix: str) -> None:
    """The ending .gz decides, in any case."""
    SAMPLES[suffix](tmp_path / f"rows{suffix}")
    packed = tmp_path / f"packed{suffix}.GZ"
    packed.write_bytes(gzip.compress((tmp_path / f"rows{suffix}").read_bytes()))
    assert [normalize_row(record) for record in read_records(packed)] == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_the_content_of_json_decides(tmp_path: Path, name: str) -> None:
    """An array, a pretty-printed array, and a record a line are read, whatever the file is called."""
    for content in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "\n".join(map(json.dumps, ROWS))):
        assert [normalize_row(r) for r in read_records(_write(tmp_path / name, content))] == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_marks(tmp_path: Path, encoding: str, suffix: str) -> None:
    """With a mark every row is read, the first one too."""
    SAMPLES[suffix](tmp_path / f"plain{suffix}")
    content = (tmp_path / f"plain{suffix}").read_bytes().decode().encode(encoding)
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    path = _write(tmp_path / f"rows{suffix}", mark + content)
    assert [normalize_row(record) for record in read_records(path)] == ROWS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_utf16_without_a_mark_is_refused(tmp_path: Path, encoding: str, suffix: str) -> None:
    """Nothing in between: no row is lost."""
    path = _write(tmp_path / f"rows{suffix}", f"{GOOD}\n".encode(encoding))
    with pytest.raises(ValueError, match="UTF-16 without a byte order mark: save it as UTF-8"):
        _rows(path)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    """A CSV file in Latin-1 says so; JSON lines have one unusable row."""
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8 \(byte 0xe9\): save it as UTF-8"):
        _rows(_write(tmp_path / "rows.csv", "prompt,completion\np,caf\u00e9\n".encode("latin-1")))
    lines = GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "c"}\n'
    assert _rows(_write(tmp_path / "rows.jsonl", lines)) == ["p", "invalid_unicode"]


CONTENTS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
    "HTML page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "compressed by gzip": gzip.compress(GOOD.encode()),
    "zip archive": b"PK\x03\x04" + bytes(30),
    "pickle": b"\x80\x04\x95" + bytes(30),
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("suffix", READERS)
def test_other_content_is_called_by_its_name(tmp_path: Path, what: str, suffix: str) -> None:
    """The first bytes tell what the file is; the message names the file and says what to do."""
    with pytest.raises(ValueError, match=rf"rows\{suffix} cannot be read as .*: it is .*{what}"):
        _rows(_write(tmp_path / f"rows{suffix}", CONTENTS[what]))


def test_a_table_of_another_type_is_called_by_its_name(tmp_path: Path) -> None:
    """A Parquet file with the ending of another type."""
    pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").rename(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"a table of the type \.parquet"):
        _rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_of_csv(tmp_path: Path, separator: str) -> None:
    """The one with which the header has the columns of a schema."""
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False, sep=separator)
    assert [normalize_row(record) for record in read_records(tmp_path / "rows.csv")] == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt,completion\nAdd 1, please,x + 1\n",
            "ends in line 2 has 3 fields, and the header 2: .*double",
        ),
        ("prompt,completion\np,c\np\n", "ends in line 3 has 1 fields, and the header 2"),
        ("prompt,completion\np,c\np,c,\n", "ends in line 3 has 3 fields"),
        ("prompt,completion\np,c,\np,c\n", "ends in line 3 has 2 fields"),
        ("prompt,completion\np,c,\np,c,d\n", "ends in line 3 has 3 fields"),
        ('prompt,completion\n"p,c\n', "line 2: unexpected end of data"),
        ('prompt,completion\n"a "quoted" word",c\n', "line 2: .*written twice"),
        ("prompt,completion,prompt\np,c,q\n", "the column 'prompt' 2 times"),
        ("a,b\n1,2\n", "its first line is 'a,b', and must name the columns prompt and completion, or instruction"),
        ("", "its first line is ''"),
    ],
)
def test_a_row_is_never_shifted_or_cut(tmp_path: Path, content: str, message: str) -> None:
    """A row with more or fewer fields than the header is refused with its line."""
    with pytest.raises(ValueError, match=message):
        _rows(_write(tmp_path / "rows.csv", content))


def test_a_separator_at_every_lines_end(tmp_path: Path) -> None:
    """As some programs write it, with the header or without; all fields are read."""
    for header in ("instruction,input,output", "instruction,input,output,"):
        path = _write(tmp_path / "rows.csv", header + "\nAdd,,c,\nTake,1,c,\n")
        assert _rows(path) == ["Add", "Take\n1"]


def test_only_columns_of_a_schema_are_read(tmp_path: Path) -> None:
    """A column that cannot be converted does no harm, if no schema reads it."""
    columns = {"prompt": ["p"], "completion": ["c"], "when": pa.array([2**62], pa.timestamp("us"))}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises((OverflowError, ValueError)):
        pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert list(read_records(tmp_path / "rows.parquet")) == [{"prompt": "p", "completion": "c"}]


def test_doubled_columns_are_refused(tmp_path: Path) -> None:
    """Neither the first nor the last wins: in tables the file is refused, in JSON the row is dropped."""
    table = pa.Table.from_arrays(
        [pa.array(["p"]), pa.array(["c"]), pa.array(["d"])], ["prompt", "completion", "completion"]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="the column 'completion' 2 times: rename or remove one"):
        _rows(tmp_path / "rows.parquet")
    doubled = '{"prompt": "p", "prompt": "q", "completion": "c"}'
    unread = '{"prompt": "p", "note": 1, "note": 2, "completion": "c"}'
    assert _rows(_write(tmp_path / "rows.jsonl", f"{doubled}\n{unread}\n")) == ["duplicate_field", "p"]


def test_tables_without_the_columns_name_theirs(tmp_path: Path) -> None:
    """The message shows what is there and what is needed."""
    pd.DataFrame({"text": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="its columns are text; rows have prompt and completion, or instruction"):
        _rows(tmp_path / "rows.parquet")
