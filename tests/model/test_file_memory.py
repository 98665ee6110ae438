"""A file is hashed once in a process, and again as soon as it may have changed."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.file_memory import recall
from model.files import ChangedFileError, sha256_file
from model.net.config import GPTConfig
from model.net.gpt import GPTModel
from model.net.loading import hash_ahead, hash_pretrained, read_pretrained, wait_for_hashes, write_pretrained

OLD = time.time_ns() - 3_600_000_000_000
CPU = torch.device("cpu")


@pytest.fixture
def old_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files were last changed long ago: no test waits until they are."""
    monkeypatch.setattr("model.file_memory._TICK_SECONDS", -60.0)


@pytest.mark.usefixtures("old_clock")
def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    found = sha256_file(path)
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: (read.append(given), digest(*given))[1])
    assert sha256_file(path) == found
    assert not read
    (tmp_path / "link").symlink_to(path)
    assert sha256_file(tmp_path / "link") == found
    assert not read


@pytest.mark.usefixtures("old_clock")
@pytest.mark.parametrize("way", ["written", "written, time put back", "replaced", "replaced, time put back"])
def test_a_changed_file_is_read_again(tmp_path: Path, way: str) -> None:
    """Of the same size; a program can set the time of the last modification, but not that of the last change."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    os.utime(path, ns=(OLD, OLD))
    assert sha256_file(path) == hashlib.sha256(b"abc").hexdigest()
    time.sleep(0.05)  # more than a tick of the file system
    if way.startswith("written"):
        with path.open("r+b") as stream:
            stream.write(b"abd")
    else:
        (tmp_path / "b").write_bytes(b"abd")
        os.replace(tmp_path / "b", path)
    if "put back" in way:
        os.utime(path, ns=(OLD, OLD))
    assert sha256_file(path) == hashlib.sha256(b"abd").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """Within a tick of the clock it could be written to again and have the same times."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    sha256_file(path)
    assert recall(path.stat()) is None


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=64)
    write_pretrained(GPTModel(config), tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.usefixtures("old_clock")
def test_weights_are_checked_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the same; a hash alone does not stand for the check of the values."""
    checked = []
    monkeypatch.setattr("model.net.loading._is_finite", lambda tensor: checked.append(tensor) or True)
    sha256_file(weights / "model.safetensors")
    _, files = hash_pretrained(weights)
    assert checked
    checked.clear()
    model = read_pretrained(weights, CPU, torch.float32, files)
    assert not checked
    monkeypatch.setattr("model.file_memory._files", {})
    again = read_pretrained(weights, CPU, torch.float32, files)
    assert checked
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.usefixtures("old_clock")
def test_changed_weights_are_found(weights: Path) -> None:
    _, files = hash_pretrained(weights)
    read_pretrained(weights, CPU, torch.float32, files)
    time.sleep(0.05)
    with (weights / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    with pytest.raises(ChangedFileError, match="has changed"):
        read_pretrained(weights, CPU, torch.float32, files)


@pytest.mark.usefixtures("old_clock")
def test_weights_that_are_written_to_while_they_are_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hash is known, and says nothing any more."""
    _, files = hash_pretrained(weights)
    time.sleep(0.05)

    def load(self: GPTModel, *given: object, **more: object) -> None:
        raise AssertionError("a model was made of them")

    def touch(name: str) -> bool:
        os.utime(weights / "model.safetensors")
        return False

    monkeypatch.setattr("model.net.loading.is_conv1d", touch)
    monkeypatch.setattr(GPTModel, "load_state_dict", load)
    with pytest.raises(ChangedFileError, match="written to while it was read"):
        read_pretrained(weights, CPU, torch.float32, files)


@pytest.mark.usefixtures("old_clock")
def test_damaged_weights_are_refused_each_time(tmp_path: Path, weights: Path) -> None:
    """A file whose values are not finite is never remembered as checked."""
    tensors = {name: p.detach() for name, p in read_pretrained(weights, CPU, torch.float32).named_parameters()}
    tensors["wte.weight"] = torch.full_like(tensors["wte.weight"], float("nan"))
    tensors = {name: t.t().contiguous() if "c_" in name and t.ndim == 2 else t for name, t in tensors.items()}
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, weights / "model.safetensors")
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            read_pretrained(weights, CPU, torch.float32)


@pytest.mark.usefixtures("old_clock")
def test_weights_are_hashed_ahead(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with them is said where they are needed, and not in a thread."""
    hash_ahead(weights)
    hash_ahead(tmp_path / "nothing")
    wait_for_hashes()
    monkeypatch.setattr("model.net.loading._is_finite", lambda tensor: pytest.fail("they are checked again"))
    hash_pretrained(weights)
    with pytest.raises(FileNotFoundError, match="nothing"):
        hash_pretrained(tmp_path / "nothing")


def test_all_threads_wait_for_what_is_hashed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second one, that comes while the first still waits."""
    done = threading.Event()
    ahead = threading.Thread(target=done.wait, args=(30,))
    monkeypatch.setattr("model.net.loading._ahead", [ahead])
    ahead.start()
    waiting = [threading.Thread(target=wait_for_hashes) for _ in range(2)]
    for thread in waiting:
        thread.start()
        thread.join(0.2)
    still = [thread.is_alive() for thread in waiting]
    done.set()
    for thread in (*waiting, ahead):
        thread.join(30)
    assert still == [True, True]
    assert not any(thread.is_alive() for thread in waiting)
