"""chrF: equal to sacrebleu's, pair by pair."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF

from model.evaluation import chrf as module
from model.evaluation.chrf import chrf

PAIRS = [
    ("", ""),
    ("a", ""),
    ("", "a"),
    (" \n", " "),
    ("abc", "abc"),
    ("a b c", "abc"),
    ("aaaa", "aa"),
    ("ab", "abcdefgh"),
    ("é中🙂", "é中🙂é"),
    ("\ud800x", "x\ud800"),
    ("\0", "\0\0"),
    ("def f(x):\n    return x", "def f(y):\n\treturn y + 1"),
]


def _random_pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(0)
    alphabet = "abcdefgh (=)\n\té\N{GRINNING FACE}"
    return [
        ("".join(generator.choices(alphabet, k=generator.randrange(60))),
         "".join(generator.choices(alphabet[: generator.randrange(1, 15)], k=generator.randrange(60))))
        for _ in range(count)
    ]  # fmt: skip


def test_it_equals_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, short and equal texts, white space, characters beyond 16 bits; also where portions end between pairs."""
    pairs = PAIRS + _random_pairs(300)
    reference = CHRF()
    want = [reference.sentence_score(text, [target]).score for text, target in pairs]
    texts, targets = zip(*pairs, strict=True)
    assert chrf(texts, targets) == pytest.approx(want, abs=1e-9)
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    assert chrf(texts, targets) == pytest.approx(want, abs=1e-9)


def test_no_pairs() -> None:
    assert isinstance(chrf([], []), np.ndarray)
    assert len(chrf([], [])) == 0
