"""Outputs of the trunk that ranks compute together: each chunk once per host, with the bits of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, Training, build, fill, outputs_of

from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.ranks import ALONE
from model.engine.trunk import TrunkCacheConfig


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    """Three ranks."""
    found = Gang(3)
    yield found
    found.end()


def filled_by_one(training: Training) -> tuple[int, np.ndarray[Any, Any]]:
    """Tokens that one process computes, and its outputs."""
    outputs = outputs_of(
        Engine(build(training, torch.device("cpu")), torch.float32), training.tokens, TrunkCacheConfig(), ALONE
    )
    for chunk in outputs.chunks:
        outputs.fill(chunk)
    assert outputs.values is not None
    return outputs.computed, outputs.values.numpy()


@pytest.mark.parametrize("place", ["host", "file"])
def test_each_chunk_is_computed_once(gang: Gang, gpt2_dir: Path, token_dir: Path, tmp_path: Path, place: str) -> None:
    """In memory and in a file: all ranks have all outputs, bit for bit, and each computed its share of them."""
    training = Training(gpt2_dir, token_dir, {}, unfrozen=2, double=False, from_files=place == "file")
    tokens, want = filled_by_one(training)
    rows = len(CodeAlpacaDataset(token_dir, "train"))
    config = TrunkCacheConfig(tmp_path if place == "file" else None)
    answers = gang.call(fill, training, config, rows)
    assert [answer[0] for answer in answers] == [place] * 3
    assert sum(answer[1] for answer in answers) == tokens
    assert max(answer[1] for answer in answers) < tokens / 2
    for _, _, ready, values in answers:
        assert ready.all()
        assert np.array_equal(values, want)
    if place == "file":  # another gang, and a process alone, read it
        assert [answer[1] for answer in gang.call(fill, training, config, rows)] == [0, 0, 0]
        assert fill(ALONE, training, config, rows)[1] == 0


def test_only_what_is_needed_is_computed(gang: Gang, gpt2_dir: Path, token_dir: Path) -> None:
    """Chunks without a row that is still needed stay empty."""
    training = Training(gpt2_dir, token_dir, {}, unfrozen=2, double=False)
    tokens, _ = filled_by_one(training)
    answers = gang.call(fill, training, TrunkCacheConfig(), 2)
    assert 0 < sum(answer[1] for answer in answers) < tokens / 2
    for _, _, ready, _ in answers:
        assert ready[:2].all()
        assert not ready.all()


def test_main_memory_is_shared_by_the_ranks_of_a_host(gang: Gang, gpt2_dir: Path, token_dir: Path) -> None:
    """Outputs that fit the limit once, but not once per rank, are not kept in memory."""
    training = Training(gpt2_dir, token_dir, {}, unfrozen=2, double=False)
    _, outputs = filled_by_one(training)
    assert gang.call(fill, training, TrunkCacheConfig(max_bytes=3 * outputs.nbytes), 2)[0][0] == "host"
    with pytest.raises(RuntimeError, match=r"assert outputs\.values is not None"):
        gang.call(fill, training, TrunkCacheConfig(max_bytes=3 * outputs.nbytes - 1), 2)
