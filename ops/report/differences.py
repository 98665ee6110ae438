"""Two texts side by side: what one has and the other lacks is marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from ops.text import storable

_PIECE = re.compile(r"\w+|\s+|[^\w\s]")
_MOST_PIECES = 600  # of a text; difflib's time grows with the square of it, and on repetitive texts with more


def shortened(text: str, characters: int) -> str:
    """A text cut at a number of characters; what was cut is said at its end."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]}… ({len(text) - characters:,} more characters)"


def plain(text: str, characters: int) -> Markup:
    """A text for a page: escaped, cut, and not empty."""
    if not text.strip():
        return Markup('<span class="remark">{}</span>').format(f"only white space, {len(text)} characters")
    return escape(storable(shortened(text, characters)))


def side_by_side(left: str, right: str, characters: int) -> tuple[Markup, Markup]:
    """Both texts escaped and cut; ``<del>`` marks what right lacks, ``<ins>`` what left lacks.

    The texts are compared in words, runs of white space and single signs. Texts of more than 600 of these are
    compared to there, and the rest is unmarked.
    """
    if not left.strip() or not right.strip():
        return plain(left, characters), plain(right, characters)
    first, second = (_PIECE.findall(storable(shortened(text, characters))) for text in (left, right))
    matcher = SequenceMatcher(None, first[:_MOST_PIECES], second[:_MOST_PIECES], autojunk=False)
    old, new = [], []
    for kind, i, j, k, m in matcher.get_opcodes():
        old.append(_marked("del", first[i:j], kind != "equal"))
        new.append(_marked("ins", second[k:m], kind != "equal"))
    rest = (escape("".join(pieces[_MOST_PIECES:])) for pieces in (first, second))
    return Markup("").join([*old, next(rest)]), Markup("").join([*new, next(rest)])


def _marked(tag: str, pieces: list[str], changed: bool) -> Markup:
    """Pieces as text; within an element if they differ and are not white space alone."""
    text = "".join(pieces)
    if not changed or not text.strip():
        return escape(text)
    return Markup(f"<{tag}>{{}}</{tag}>").format(text)
