"""Fuzzing of the row readers: any bytes under any name give rows, reasons to drop a row, or one ValueError."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from model.data.formats import READERS, read_records
from model.data.layout import find_layout
from model.data.schemas import UnusableRow, normalize_row

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
# FINETUNE_FUZZ_EXAMPLES=20000 fuzzes for minutes.
EXAMPLES = int(os.environ.get("FINETUNE_FUZZ_EXAMPLES", "60"))
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    suppress_health_check=list(hypothesis.HealthCheck),
)

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


@SETTINGS
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


@SETTINGS
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


@SETTINGS
@hypothesis.given(card=st.text() | st.from_regex(r"---\nconfigs:\n- config_name: \w+\n  data_files: [^\n]+\n---\n"))
def test_any_card_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, card: str) -> None:
    """No file outside the folder is found, whatever the card says."""
    folder = tmp_path_factory.getbasetemp() / "card"
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").touch()
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    try:
        layout = find_layout(Path(folder))
    except ValueError:
        return
    assert {path.parent for paths in layout.splits.values() for path in paths} <= {folder}
