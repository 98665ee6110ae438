"""Texts side by side: marks where they differ, and nothing of a text gets out as HTML."""

from __future__ import annotations

import re
import time
from html import unescape

import pytest
from finished_runs import HOSTILE

from ops.report.differences import plain, shortened, side_by_side

_TAGS = re.compile(r'</?(?:del|ins)>|<span class="remark">|</span>')


def _text(marked: str) -> str:
    """What a browser shows."""
    return unescape(_TAGS.sub("", marked))


def test_what_one_text_alone_has_is_marked() -> None:
    left, right = side_by_side("def add(a):\n    return a + 1", "def add(a):\n    return a + 2 * b", 1000)
    assert left == "def add(a):\n    return a + <del>1</del>"
    assert right == "def add(a):\n    return a + <ins>2 * b</ins>"


def test_equal_texts_have_no_marks() -> None:
    assert side_by_side("a < b", "a < b", 1000) == ("a &lt; b", "a &lt; b")


@pytest.mark.parametrize("left", HOSTILE)
@pytest.mark.parametrize("right", HOSTILE)
def test_hostile_texts_stay_texts(left: str, right: str) -> None:
    """No tag but the marks, all characters kept, and a bound on length and time."""
    began = time.monotonic()
    for given, marked in zip((left, right), side_by_side(left, right, 1000), strict=True):
        assert "<" not in _TAGS.sub("", marked)
        assert len(marked) < 10_000
        marked.encode()  # no lone surrogates
        if given.strip():
            kept = given[:1000].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
            assert _text(marked).startswith(kept)
    assert time.monotonic() - began < 5


def test_a_blank_text_says_so() -> None:
    assert _text(plain(" \n", 100)) == "only white space, 2 characters"
    assert _text(side_by_side("", "x", 100)[0]) == "only white space, 0 characters"
    assert side_by_side("", "x", 100)[1] == "x"


def test_a_long_text_says_how_much_was_cut() -> None:
    assert shortened("abcdef", 4) == "abcd… (2 more characters)"
    assert shortened("abcd", 4) == "abcd"
    assert _text(plain("y" * 3000, 1000)).endswith("… (2,000 more characters)")
