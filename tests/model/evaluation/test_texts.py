"""What a text alone says: Python or not, equal or not, repetitive or not."""

from __future__ import annotations

import warnings

import pytest

from model.evaluation.texts import is_exact, is_python, repetition


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x",
        "import os",
        "x = 1",
        "x: int = 1",
        "print('hello')",
        "for i in range(3):\n    print(i)",
        "Here it is:\n```python\nx = 1\n```\nDone.",
        "async def f():\n    pass",
        "1\nx += 1",
        "async def f():\n    return 1",
        "class A:\n    pass",
        "from os import path",
        "while x:\n    x -= 1",
        "if x:\n    pass",
        "with f:\n    pass",
        "async for x in y:\n    pass",
        "async with x:\n    pass",
        "try:\n    f()\nexcept E:\n    pass",
        "match x:\n    case 1:\n        pass",
        "return x",  # the body of a function, as HumanEval's prompts ask for
    ],
)
def test_code_is_python(text: str) -> None:
    assert is_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# only a comment",
        "Hello",
        "42",
        "'a string'",
        "[1, 2, 3]",
        "Note: True",
        "raise awareness",
        "global warming",
        "pass",
        "console.log(1)",
        "color: red",
        "SELECT * FROM t",
        "let x = 1;",
        "def f(x:\n    return x",
        "```python\nHello\n```",
    ],
)
def test_prose_and_other_languages_are_not(text: str) -> None:
    """Prose of one or two words parses as Python, and so does nothing at all: neither counts."""
    assert not is_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\0",
        "\ud800 = 1",
        "x = " + "(" * 10_000,
        "x = " + "-" * 100_000 + "1",
        "x = a" + ".b" * 50_000,
        "x = " + "[" * 150 + "]" * 150,
        "x = " + "f(" * 150,
        "x = " + "{" * 90,
        "if x:\n" * 100,
        "x = 1" + "0" * 10_000,
        "\\" * 5_000,
        "f'{" * 500,
    ],
    ids=range(12),
)
def test_hostile_text_is_answered(text: str) -> None:
    """Null bytes, lone surrogates, and nesting that exhausts the parser: an answer, without an exception."""
    assert is_python(text) in (True, False)


def test_warnings_of_completions_are_not_shown() -> None:
    """An invalid escape in generated code is no warning of this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_python("x = '\\d'")
        assert is_python("x = 1 is 1")


@pytest.mark.parametrize(
    ("text", "reference", "equal"),
    [
        ("x = 1", "x = 1", True),
        ("x = 1  \n\n\ny = 2\n", "\nx = 1\ny = 2", True),
        ("```python\nx = 1\n```", "x = 1", True),
        ("  x = 1", "x = 1", False),
        ("x  = 1", "x = 1", False),
        ("X = 1", "x = 1", False),
        ("", "x = 1", False),
    ],
)
def test_exact_but_for_lines_and_fence(text: str, reference: str, equal: bool) -> None:
    """Indentation and case have a meaning; blank lines and white space at line ends have none."""
    assert is_exact(text, reference) is equal


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", 1 - 4 / 5),
        ("a a a a a a a", 1 - 1 / 4),
        ("x+y", 0.0),
        ("((((((((", 1 - 1 / 5),
    ],
)
def test_repetition_is_seq_rep_4(text: str, share: float) -> None:
    """1 - distinct 4-grams / 4-grams, of words and single other characters."""
    assert repetition(text) == pytest.approx(share)
