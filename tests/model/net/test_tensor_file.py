"""The reader of safetensors files: the library's values, the file's hash, and damaged headers."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.files import sha256_file
from model.net.tensor_file import open_tensors


def test_values_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    """Every dtype of weights, empty tensors and scalars, bit for bit as the library reads them."""
    torch.manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"{dtype}": torch.randn(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "mask": torch.ones(2, 2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    with open_tensors(tmp_path / "x") as file:
        got = {key: tensor.clone() for key, tensor in file.tensors()}
    want = load_file(tmp_path / "x")
    assert got.keys() == want.keys() - {"mask"}
    for key in got:
        assert torch.equal(got[key], want[key]), key
        assert got[key].dtype == want[key].dtype
    assert file.sha256 == sha256_file(tmp_path / "x")


class SlowDigest:
    """sha256 of a machine that hashes more slowly than it reads and computes."""

    def __init__(self, digest: Any):
        self.digest = digest

    def update(self, content: memoryview) -> None:
        time.sleep(0.05)
        self.digest.update(content)

    def hexdigest(self) -> str:
        return str(self.digest.hexdigest())


def test_what_is_hashed_is_what_was_given_out(tmp_path: Path) -> None:
    """The thread that hashes is done with a tensor before its memory holds another one."""
    save_file({f"{number}": torch.full((100,), float(number)) for number in range(8)}, tmp_path / "x")
    with open_tensors(tmp_path / "x") as file:
        file._digest = SlowDigest(file._digest)  # type: ignore[assignment]
        assert [(key, float(tensor.sum())) for key, tensor in file.tensors()] == [
            (f"{number}", 100.0 * number) for number in range(8)
        ]
    assert file.sha256 == sha256_file(tmp_path / "x")


def test_a_caller_that_gives_up_leaves_no_thread(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "x")
    with open_tensors(tmp_path / "x") as file:
        tensors = file.tensors()
        next(tensors)
        tensors.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hash-weights")]


ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**ENTRY, "data_offsets": [8, 16]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": [True, 2]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0, 2**70]}},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        [],
        {},
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: Any) -> None:
    """Gaps, overlaps, wrong sizes and other values than the format has."""
    raw = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(ValueError, match="x is not a whole safetensors file"), open_tensors(tmp_path / "x"):
        pass


def test_more_bytes_than_tensors_are_refused(tmp_path: Path) -> None:
    """A file with something appended was changed by someone."""
    save_file({"a": torch.zeros(2)}, tmp_path / "x")
    with (tmp_path / "x").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ValueError, match="its tensors have 12 bytes instead of 8"), open_tensors(tmp_path / "x"):
        pass


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """Its size was right when it was opened."""
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x")
    with open_tensors(tmp_path / "x") as file:
        (tmp_path / "x").write_bytes(b"")
        with pytest.raises(ValueError, match="it became shorter while it was read"):
            list(file.tensors())


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": NaN}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"step": 3}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {"dtype": "F32", "shape": [2], '
        b'"data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": '
        b'[0, 18446744073709551616], "data_offsets": [8, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": '
        b'[0, 4294967296, 4294967296], "data_offsets": [8, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'.encode("utf-16"),
        b"[" * 100_000,
    ],
    ids=["NaN", "metadata", "twice", "size", "product", "encoding", "depth"],
)
def test_a_header_that_the_library_refuses_is_refused(tmp_path: Path, header: bytes) -> None:
    """What other programs cannot read is damaged, and a shape that torch cannot have is no tensor."""
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    said = "x is not a whole safetensors file: its header is damaged"
    with pytest.raises(ValueError, match=said) as caught, open_tensors(tmp_path / "x"):
        pass
    assert len(str(caught.value)) < 500
