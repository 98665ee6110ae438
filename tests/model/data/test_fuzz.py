"""Fuzzing of data: any file gives rows, reasons to drop a row, or one ValueError; so do cards and token files."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import (
    PLACES,
    check_message,
    hypothesis,
    limits,
    mutated_bytes,
    mutated_json,
    put,
    settings,
    st,
)
from hard_yaml import HARD_YAML

from model.data.formats import READERS, read_records
from model.data.layout import find_layout
from model.data.schemas import UnusableRow, normalize_row
from model.data.tokens import CodeAlpacaDataset, verify_tokens

_FIELDS = st.sampled_from(
    ["prompt", "completion", "instruction", "input", "output", "messages", "conversations", "tests", "family", "x"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner),
    max_leaves=6,
)
_RECORDS = st.dictionaries(_FIELDS, _VALUES, max_size=5)
_JSON = st.lists(_RECORDS, max_size=4).map(lambda rows: "\n".join(json.dumps(row) for row in rows))
_ARRAYS = st.lists(_RECORDS, max_size=4).map(json.dumps)
_LINES = st.lists(
    st.lists(st.sampled_from(["prompt", "completion", "a", '"', '""', "\n", "", "x,y", "é", "\0"]), max_size=4),
    max_size=5,
)
_TABLES = st.builds(
    lambda separator, lines: "\n".join(separator.join(fields) for fields in [["prompt", "completion"], *lines]),
    st.sampled_from([",", ";", "\t", "|"]),
    _LINES,
)
_TEXTS = st.builds(
    lambda text, encoding: text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"),
    _JSON | _ARRAYS | _TABLES | st.text(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]),
)
_MAGIC = st.builds(
    lambda magic, rest: magic + rest,
    st.sampled_from([b"PAR1", b"ARROW1", b"\x1f\x8b", b"PK\x03\x04", b"\x80\x04", b"version https://git-lfs", b"["]),
    st.binary(max_size=64),
)


@settings()
@hypothesis.given(suffix=st.sampled_from([*READERS]), content=_TEXTS | _MAGIC | st.binary(), packed=st.booleans())
def test_any_file_gives_rows_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, packed: bool
) -> None:
    """No other exception leaves the readers, and each kept row has two valid texts."""
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    message = str(path)
    try:
        for record in read_records(path):
            _check(record)
    except ValueError as error:
        message = str(error)
    assert str(path) in message


@settings(share=2)
@hypothesis.given(record=_VALUES | _RECORDS)
def test_any_record_is_a_row_or_has_a_reason(record: Any) -> None:
    """Nested values of any type included."""
    _check(record)


def _check(record: Any) -> None:
    try:
        row = normalize_row(record)
    except UnusableRow:
        return
    for text in (row["prompt"], row["completion"], row.get("family", "")):
        text.encode()
    assert row["prompt"].strip()
    assert row["completion"].strip()


_ROWS = [
    {"prompt": f"Add {i} to x.", "completion": f"x + {i}", "tests": ["assert True"], "family": "add"}
    for i in range(4)
]


def _samples() -> dict[str, bytes]:
    """A whole file of each type."""
    lines = [json.dumps(row) for row in _ROWS]
    plain = [[row["prompt"], row["completion"]] for row in _ROWS]
    table = pa.table({name: [row[name] for row in _ROWS] for name in _ROWS[0]})
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    found = {".jsonl": "\n".join(lines).encode(), ".json": json.dumps(_ROWS).encode()}
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        found[suffix] = "\n".join(map(separator.join, [["prompt", "completion"], *plain])).encode()
    return {**found, ".parquet": parquet.getvalue(), ".arrow": arrow.getvalue()}


SAMPLES = _samples()


@settings(few=60)
@hypothesis.given(data=st.data(), suffix=st.sampled_from([*READERS]), packed=st.booleans())
def test_any_damaged_file_gives_rows_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any, suffix: str, packed: bool
) -> None:
    """Some bytes of a whole file are changed, before or after its compression, or something else stands there."""
    folder = tmp_path_factory.getbasetemp() / "damaged" / "here"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fuzz{suffix}{'.gz' if packed else ''}"
    content = data.draw(mutated_bytes(SAMPLES[suffix]))
    if packed:
        content = data.draw(mutated_bytes(gzip.compress(content, mtime=0), 1))
    if suffix in (".json", ".jsonl") and not packed and data.draw(st.booleans()):
        content = data.draw(mutated_json(_ROWS))
    place = data.draw(PLACES)
    put(path, content, place)
    try:
        with limits(folder):
            for record in read_records(path):
                _check(record)
    except ValueError as error:
        check_message(error, str(path))
    finally:
        put(path, b"", "absent")


_PATTERNS = st.sampled_from(
    ["train.jsonl", "**", "*", "../secret.jsonl", "/etc/*", "https://x/y", "a\0", "*t" * 40, "*/" * 30, "?" * 300]
) | st.sampled_from(["**/" * 30 + "x", "[a", "train.jsonl/..", "sub/./a.jsonl", "~/x"])


@settings(few=60)
@hypothesis.given(data=st.data())
def test_any_card_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """No file outside the folder is found or opened, whatever the card says."""
    folder = tmp_path_factory.getbasetemp() / "cards" / "here"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder.parent / "secret.jsonl").touch()
    names = ["train.jsonl", f"{'t' * 200}.jsonl", "sub/test.jsonl"]
    for name in names:
        (folder / name).touch()
    configs = [
        {"config_name": "a", "data_files": data.draw(_PATTERNS), "default": True},
        {"config_name": "b", "data_dir": "sub", "data_files": [{"split": "train", "path": data.draw(_PATTERNS)}]},
    ]
    texts = st.one_of(
        mutated_json({"configs": configs}),
        st.text().map(str.encode),
        st.sampled_from(HARD_YAML).map(str.encode),
        st.binary(max_size=40),
    )
    head = data.draw(texts)
    put(folder / "README.md", data.draw(mutated_bytes(b"---\n" + head + b"\n---\n", 1)), data.draw(PLACES))
    try:
        with limits(folder):
            layout = find_layout(folder, data.draw(st.sampled_from([None, "a", "b", "c"])))
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(folder))
        return
    assert {str(path.relative_to(folder)) for paths in layout.splits.values() for path in paths} <= set(names)


@settings(few=40)
@hypothesis.given(data=st.data())
def test_any_state_of_save_to_disk_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """It names the shards among a folder's files."""
    folder = tmp_path_factory.getbasetemp() / "saved" / "here"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data-00000-of-00001.arrow").write_bytes(SAMPLES[".arrow"])
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    put(folder / "state.json", data.draw(mutated_json(state)), data.draw(PLACES))
    try:
        with limits(folder):
            find_layout(folder)
    except (ValueError, FileNotFoundError) as error:
        check_message(error, str(folder))


@settings(few=60)
@hypothesis.given(data=st.data())
def test_any_token_directory_is_whole_or_written_again(
    tmp_path_factory: pytest.TempPathFactory, token_dir: Path, data: Any
) -> None:
    """What is taken for whole says what it said when it was written."""
    folder = tmp_path_factory.getbasetemp() / "token-files" / "here"
    if not folder.exists():
        shutil.copytree(token_dir, folder)
    meta = json.loads((token_dir / "meta.json").read_text())
    put(folder / "meta.json", data.draw(mutated_json(meta)), data.draw(PLACES))
    name = data.draw(st.sampled_from(sorted(meta["files"])))
    content = (token_dir / name).read_bytes()
    if data.draw(st.booleans()):
        put(folder / name, data.draw(mutated_bytes(content, 1)), data.draw(PLACES))
    with limits(folder, token_dir):
        found = verify_tokens(folder)
        if found is not None:
            assert {**found, "sha256": meta["sha256"]} == meta
            left, right = (CodeAlpacaDataset(each, "test") for each in (folder, token_dir))
            assert np.array_equal(left.ids, right.ids)
            assert left.rows == right.rows
    put(folder / name, content)
