"""Reads the records of a file of any type in READERS, compressed by gzip or not, in UTF-8 or with a byte order mark.

Public reports that shaped it: columns shifted by an unquoted comma (pandas#14124), JSON lines named .json
(datasets#6891), an array named .jsonl, UTF-16, Git LFS pointers in place of files, duplicate columns (arrow#37428),
and an unused column that cannot be converted (arrow-rs#982).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from model.data.schemas import COLUMNS, SCHEMAS, UnusableRow
from model.file_contents import HEAD_BYTES, describe_bytes
from model.files import check_plain, reason_of

_GZIP = ".gz"
_SEPARATORS = ",;\t|"
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
# The longer mark first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def file_type(path: Path) -> str | None:
    """The key of READERS that a file's name ends with, ``.gz`` behind it ignored; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == _GZIP:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_records(path: Path) -> Iterator[Any]:
    """Yield a file's records in order; an UnusableRow stands in for a line that cannot be read.

    Only the columns that a schema reads are read from tables.

    Args:
        path: a file of a type in READERS.

    Raises:
        ValueError: the file as a whole cannot be read; the message names the file, the line if there is one, and the
            remedy.
    """
    kind = file_type(path)
    if kind is None:
        raise ValueError(f"{path} is none of {', '.join(READERS)}, compressed by gzip ({_GZIP}) or not")
    try:
        with _open(path, kind) as stream:
            yield from READERS[kind](stream)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}" if isinstance(error.object, bytes) else "invalid bytes"
        raise ValueError(f"{path} is not {error.encoding.upper()} ({found}): save it as UTF-8") from error
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {reason_of(error)}") from error


def _open(path: Path, kind: str) -> io.BufferedReader:
    """Open a file, decompressed if its name ends with .gz, and look at its first bytes.

    Raises:
        OSError: it cannot be opened, or is no file.
        ValueError: it is something else, such as a Git LFS pointer; the message says what it is and what to do.
    """
    check_plain(path)
    raw: Any = gzip.open(path) if path.suffix.lower() == _GZIP else io.FileIO(path)  # noqa: SIM115  # closed by reader
    reader = io.BufferedReader(raw)
    try:
        head = reader.peek(HEAD_BYTES)[:HEAD_BYTES]
        other = describe_bytes(head)
        for magic, owner in _TABLES.items():
            if head.startswith(magic) and kind != owner:
                other = f"a table of the type {owner}: let its name end with that"
        if other:
            raise ValueError(f"it is {other}")
    except BaseException:
        reader.close()
        raise
    return reader


def _encoding(stream: io.BufferedReader) -> str:
    """The encoding of a text file by its byte order mark, which is skipped; UTF-8 without one.

    Raises:
        ValueError: it looks like UTF-16 or UTF-32 without a mark.
    """
    head = stream.peek(4)[:4]
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            stream.read(len(mark))
            return encoding
    if [byte == 0 for byte in head] in ([False, True, False, True], [True, False, True, False]):
        raise ValueError("it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return "utf-8"


def _text(stream: io.BufferedReader, newline: str | None) -> io.TextIOWrapper:
    """The decoded file. A lone surrogate of UTF-16 is passed on: the row that has it is found unusable later."""
    encoding = _encoding(stream)
    errors = "strict" if encoding == "utf-8" else "surrogatepass"
    return io.TextIOWrapper(stream, encoding, errors, newline)


def _lines(stream: io.BufferedReader) -> Iterator[str | UnusableRow]:
    """The lines of a text file; in UTF-8, a line with invalid bytes is one unusable row."""
    encoding = _encoding(stream)
    if encoding != "utf-8":
        yield from io.TextIOWrapper(stream, encoding, "surrogatepass", newline="\n")
        return
    for line in stream:
        try:
            yield line.decode()
        except UnicodeDecodeError:
            yield UnusableRow("invalid_unicode")


def _read_jsonl(stream: io.BufferedReader) -> Iterator[Any]:
    """One record a line, or a JSON array of records, whatever the file is called: the first character decides."""
    lines = _lines(stream)
    first: str | UnusableRow = ""
    for first in lines:
        if isinstance(first, UnusableRow) or first.strip():
            break
    rest: Iterable[str | UnusableRow] = lines
    if isinstance(first, str) and first.lstrip().startswith("["):
        rest = list(lines)
        if (array := _read_array([first, *rest])) is not None:
            yield from array
            return
    for line in chain((first,), rest):
        if isinstance(line, UnusableRow):
            yield line
        elif line.strip():
            try:
                yield _parse(line)
            except (ValueError, RecursionError):  # RecursionError: nested too deeply
                yield UnusableRow("invalid_json")


def _read_array(lines: Sequence[str | UnusableRow]) -> list[Any] | None:
    """The elements of a JSON array that spans a whole file; None if it is none."""
    try:
        records = _parse("".join(line for line in lines if isinstance(line, str)))
    except (ValueError, RecursionError):
        return None
    if len(lines) == 1 and not any(isinstance(record, dict) for record in records):
        return None  # one line that is a list: a row that is no object
    return list(records)


def _read_json(stream: io.BufferedReader) -> Iterator[Any]:
    """As ``_read_jsonl``, but a file without one readable line is an error, and so is a single object of columns."""
    records = _read_jsonl(stream)
    first, second = next(records, None), next(records, None)
    if isinstance(first, UnusableRow) and first.reason in ("invalid_json", "invalid_unicode"):
        raise ValueError("it is neither a JSON array of rows nor one row a line")
    if second is None and isinstance(first, dict) and not _is_row(first):
        raise ValueError(f"it is one JSON object ({', '.join(first)[:200]}), and not a list of rows")
    yield from (record for record in (first, second) if record is not None)
    yield from records


def _is_row(record: dict[str, Any]) -> bool:
    """Whether an object has the fields of a schema, and not whole columns in their place."""
    fitting = [fields for fields in SCHEMAS if set(fields) <= record.keys()]
    return bool(fitting) and not (len(fitting[0]) > 1 and all(isinstance(record[name], list) for name in fitting[0]))


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> Any:
    """An object; an UnusableRow in its place where a column that a schema reads stands there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        if any(names.count(name) > 1 for name in COLUMNS):
            return UnusableRow("duplicate_field")
    return record


def _read_parquet(stream: io.BufferedReader) -> Iterator[Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(stream if stream.seekable() else io.BytesIO(stream.read()))
    columns = _chosen(file.schema_arrow.names)
    for batch in file.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _read_arrow(stream: io.BufferedReader) -> Iterator[Any]:
    """A shard that ``datasets`` wrote by save_to_disk."""
    import pyarrow as pa
    from datasets import Dataset

    table = Dataset.from_buffer(pa.py_buffer(stream.read()))
    yield from table.select_columns(_chosen(table.column_names))


def _chosen(names: Sequence[str]) -> list[str]:
    """The columns of a table that a schema reads.

    Raises:
        ValueError: one of them is there twice, or no schema fits.
    """
    if doubled := sorted(name for name in COLUMNS if names.count(name) > 1):
        raise ValueError(f"it has the column {doubled[0]!r} {names.count(doubled[0])} times: rename or remove one")
    if not any(set(fields) <= set(names) for fields in SCHEMAS):
        raise ValueError(f"its columns are {', '.join(names) or 'none'}; rows have {describe_schemas()}")
    return [name for name in names if name in COLUMNS]


def describe_schemas() -> str:
    """The required columns of each schema, for messages."""
    return ", or ".join(" and ".join(fields) for fields in SCHEMAS)


def _read_csv(stream: io.BufferedReader) -> Iterator[Any]:
    """Text fields by the header's names. No row is shifted or cut: a row with another number of fields is refused.

    The separator is the one of ``,`` ``;`` tab ``|`` with which the header has the columns of a schema. Some programs
    write a separator at the end of every line: this is accepted if each row has it, and nothing behind it.
    """
    text = _text(stream, newline="")
    header = text.readline()
    names, separator = _header(header)
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(text, delimiter=separator, strict=True)
    wanted = [(names.index(name), name) for name in _chosen(names)]
    surplus: int | None = None  # 1 where every line ends with a separator
    try:
        for fields in rows:
            if not fields:
                continue
            if surplus is None:
                surplus = int(len(fields) == len(names) + 1 and not fields[-1])
            if len(fields) != len(names) + surplus or (surplus and fields[-1]):
                raise ValueError(
                    f"the row that ends in line {rows.line_num + 1} has {len(fields)} fields, and the header "
                    f'{len(names)}: put fields that contain {separator!r} or line breaks in double quotes (")'
                )
            yield {name: fields[index] for index, name in wanted}
    except csv.Error as error:
        raise ValueError(
            f'line {rows.line_num + 1}: {error}; a double quote (") inside a quoted field is written twice'
        ) from error


def _header(line: str) -> tuple[list[str], str]:
    """The column names of a CSV file and its separator.

    Raises:
        ValueError: with no separator the header has the columns of a schema.
    """
    for separator in _SEPARATORS:
        names = [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
        if any(set(fields) <= set(names) for fields in SCHEMAS):
            if not names[-1]:
                names.pop()  # a separator at the end of every line
            return names, separator
    raise ValueError(
        f"its first line is {line.strip()[:200]!r}, and must name the columns {describe_schemas()}, "
        f"separated by one of {' '.join(map(repr, _SEPARATORS))}"
    )


# A reader yields the records of an open file in order. It raises ValueError or OSError if it cannot.
READERS: Mapping[str, Callable[[io.BufferedReader], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(f"{suffix}{gz}" for suffix in READERS for gz in ("", _GZIP))
