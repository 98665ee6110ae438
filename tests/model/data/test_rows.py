"""Keys of rows and the draw of splits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from model.data.rows import fraction, prompt_key, row_key
from model.data.schemas import normalize_row


@pytest.mark.parametrize("same", ["ADD one", "Add  one", " Add\tone\n", "Add \uff4fne"])
def test_similar_prompts_share_a_key(same: str) -> None:
    """Case, white space and Unicode form are ignored, so copies of a held-out prompt are recognised."""
    assert prompt_key(same) == prompt_key("Add one")
    assert prompt_key("Add two") != prompt_key("Add one")


def test_fraction_is_uniform_and_depends_on_all_three(make_rows: Callable[[int], list[dict[str, str]]]) -> None:
    """Shares are as requested, and test, validation and seeds are drawn independently."""
    keys = [prompt_key(str(i)) for i in range(2000)]
    test = [fraction(key, 42, "test") < 0.1 for key in keys]
    validation = [fraction(key, 42, "validation") < 0.1 for key in keys]
    other = [fraction(key, 43, "test") < 0.1 for key in keys]
    for chosen in (test, validation, other):
        assert sum(chosen) == pytest.approx(200, abs=55)  # four standard deviations
    for pair in ((test, validation), (test, other)):
        assert sum(a and b for a, b in zip(*pair, strict=True)) == pytest.approx(20, abs=18)
    assert all(0 <= fraction(key, 1, "x") < 1 for key in keys)


def test_row_keys_are_of_the_content() -> None:
    """The key changes with any field of the normalised row; schema and unread fields do not matter."""
    row = {"prompt": "p", "completion": "c", "tests": ["assert f(1) == 2"], "family": "all"}
    changes = [{"prompt": "p "}, {"completion": "C"}, {"tests": []}, {"family": "other"}]
    assert len({row_key(row), *(row_key({**row, **change}) for change in changes)}) == 5
    assert row_key(dict(reversed(row.items()))) == row_key(row)
    one = normalize_row({"instruction": "p", "input": "", "output": "c", "id": 7})
    assert row_key(one) == row_key(normalize_row({"prompt": "p", "completion": "c", "id": 8}))
    # Keys are stored in MLflow: their values must never change.
    assert row_key({"prompt": "Add \u2603", "completion": "x + 1\n"}) == 5072156249635746624
