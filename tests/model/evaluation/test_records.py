"""Records: one for each row of the test split, with the values of both models where they belong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.config import PrepareConfig
from model.data.layout import find_splits
from model.data.preparing import prepare
from model.data.tokens import CodeAlpacaDataset
from model.evaluation.completions import Completion
from model.evaluation.records import Answers, References, build_records, content_key, references_of

ROWS = [
    {"row": 3, "prompt": "p", "completion": "x = 1", "tests": ["assert x == 1"], "family": "f"},
    {"row": 7, "prompt": "q", "completion": "Hello"},
]
REFERENCES = References(ROWS, np.array([4, 2]), ["x = 1", "Héllo"], ["x =", "Hello"], [False, True])


def _answers(texts: list[str | None], losses: list[float], passed: list[bool | None]) -> Answers:
    completions = [None if text is None else Completion(text, text.startswith("x")) for text in texts]
    return Answers(np.array(losses), completions, passed, [None if ok in (True, None) else "why" for ok in passed])


def test_each_value_stands_where_it_belongs() -> None:
    """Base and tuned are not exchanged; a row without tests, or whose reference is no Python, has no such score."""
    base = _answers(["Hello", "Hello"], [8.0, 2.0], [False, None])
    tuned = _answers(["x = 1", None], [4.0, 1.0], [True, None])
    first, second = build_records(REFERENCES, base, tuned)
    assert first == {
        "key": content_key(ROWS[0]), "row": 3, "family": "f", "prompt": "p", "reference": "x = 1", "tokens": 4,
        "bytes": 5, "base_text": "Hello", "text": "x = 1", "base_loss": 8.0, "loss": 4.0, "base_stopped": False,
        "stopped": True, "base_syntax": False, "syntax": True, "base_chrf": 0.0, "chrf": pytest.approx(100.0),
        "base_exact": False, "exact": True, "base_repetition": 0.0, "repetition": 0.0, "base_empty": False,
        "empty": False, "base_length": 5, "length": 5, "base_passed": False, "passed": True, "base_failure": "why",
        "failure": None, "reference_stopped": False, "reference_syntax": False,
    }  # fmt: skip
    assert second["bytes"] == 6  # é has two
    assert (second["family"], second["base_exact"], second["base_chrf"]) == (None, True, pytest.approx(100.0))
    for name in ("text", "stopped", "chrf", "exact", "length", "syntax", "base_syntax", "passed", "reference_syntax"):
        assert second[name] is None, name


def test_a_key_is_of_content_alone() -> None:
    """The same in every run, wherever the row stands; other content, another key."""
    moved = {**ROWS[0], "row": 99}
    assert content_key(moved) == content_key(dict(reversed(moved.items()))) == content_key(ROWS[0])
    assert len(content_key(ROWS[0])) == 16
    assert content_key({**ROWS[0], "completion": "x = 2"}) != content_key(ROWS[0])


def test_a_loss_that_is_not_finite_stays_visible() -> None:
    """None would say that the row has no loss, and the row would be left out of the mean."""
    broken = _answers(["a", "b"], [math.nan, 1.0], [None, None])
    fine = _answers(["a", "b"], [1.0, 1.0], [None, None])
    first, second = build_records(REFERENCES, fine, broken)
    assert (first["loss"], second["loss"]) == (math.inf, 1.0)


@pytest.mark.parametrize("max_length", [40, 200])
def test_references_are_what_was_scored(max_length: int, tmp_path: Path, data_dir: Path, tokenizer: Any) -> None:
    """Bytes are those of the scored tokens, also where a row is cut; limits are of the whole reference."""
    config = PrepareConfig(max_length=max_length, test_share=0.4, validation_share=0.2)
    prepare(find_splits(data_dir), tokenizer, config, tmp_path / "tokens")
    test = CodeAlpacaDataset(tmp_path / "tokens", "test")
    sizes = [len(tokenizer.encode(row["completion"])) for row in test.rows]
    limit = sorted(sizes)[len(sizes) // 2]  # of one row at least there is no room for its end-of-text token alone
    found = references_of(test, tokenizer, test.lengths[:, 0] - test.lengths[:, 1], max_new_tokens=limit)
    cut = 0
    for index, row in enumerate(test.rows):
        whole = tokenizer.encode(row["completion"])
        length, prompt = test.lengths[index]
        scored = test[index]["input_ids"].tolist()[prompt:]
        ended = scored[-1] == tokenizer.eos_token_id
        cut += not ended
        assert found.texts[index] == tokenizer.decode(whole[: length - prompt])
        assert (found.texts[index] == row["completion"]) is ended
        assert found.stopped[index] == (len(whole) + 1 <= limit)
        assert found.within_limit[index] == tokenizer.decode(whole[:limit])
    assert (cut > 0) is (max_length == 40), "both cases were seen"
    assert len(set(found.stopped)) == 2
