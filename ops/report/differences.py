"""Two texts side by side: what one has and the other lacks is marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from ops.text import storable

_PIECE = re.compile(r"\w+|\s+|[^\w\s]")


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

    The texts are compared in words, runs of white space and single signs. difflib's time grows with the square of
    their number and more; for 1,000 characters it is 0.3 s at most.
    """
    if not left.strip() or not right.strip():
        return plain(left, characters), plain(right, characters)
    first, second = (_PIECE.findall(storable(shortened(text, characters))) for text in (left, right))
    old, new = [], []
    for kind, i, j, k, m in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        old.append(_marked("del", first[i:j], kind != "equal"))
        new.append(_marked("ins", second[k:m], kind != "equal"))
    return Markup("").join(old), Markup("").join(new)


def _marked(tag: str, pieces: list[str], changed: bool) -> Markup:
    """Pieces as text; within an element if they differ and are not white space alone."""
    text = "".join(pieces)
    if not changed or not text.strip():
        return escape(text)
    return Markup(f"<{tag}>{{}}</{tag}>").format(text)
