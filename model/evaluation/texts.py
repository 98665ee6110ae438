"""What is said of a completion by its text alone: whether it is Python, equals the reference, repeats itself."""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Iterator, Sequence

from model.evaluation.completions import extract_code

_GRAM = 4  # words of an n-gram whose repetition is counted
_WORD = re.compile(r"\w+|[^\w\s]")
# Statements that prose does not parse as. "Note: True" is an annotation, "raise awareness" and "global warming" are
# statements too, so that these kinds do not count.
_CODE = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Import,
    ast.ImportFrom,
    ast.Assign,
    ast.AugAssign,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.If,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.Match,
    ast.Return,
)


def is_python(text: str) -> bool:
    """Whether a text, or what stands in its Markdown fence, is Python code.

    It is if it parses (nothing is executed), and one of its outermost statements is more than an expression that
    prose might parse as: a definition, an import, an assignment, a loop, a condition, ``with``, ``try``, ``match``
    or ``return``, or a call of a builtin such as ``print(1)``. ``Hello`` and ``42`` parse as Python and are none.
    """
    tree = _parse(extract_code(text))
    return tree is not None and any(_is_code(statement) for statement in tree.body)


def _parse(code: str) -> ast.Module | None:
    """The syntax tree; None where there is none, whatever the text is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like, in texts that are not this project's
        try:
            return ast.parse(code)
        except Exception:  # SyntaxError, ValueError of a null byte, RecursionError, MemoryError, OverflowError
            return None


def _is_code(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        call = statement.value
        return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id)
    if isinstance(statement, ast.AnnAssign):
        return statement.value is not None
    return isinstance(statement, _CODE)


def is_exact(text: str, reference: str) -> bool:
    """Whether two texts are equal, but for a Markdown fence, blank lines and white space at the ends of lines."""
    return _normal(text) == _normal(reference)


def _normal(text: str) -> list[str]:
    lines = [line.rstrip() for line in extract_code(text).splitlines()]
    return [line for line in lines if line]


def repetition(text: str) -> float:
    """seq-rep-4 (Welleck et al. 2020): the share of a text's 4-grams that occurred in it before.

    The n-grams are of words and single other characters, not of tokens, so that models with different tokenizers can
    be compared. A text of fewer than four of them repeats nothing.
    """
    words = _WORD.findall(text)
    grams = list(_grams(words))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(_GRAM)), strict=False)
