"""Notices to people about what a run came to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence


def notify(title: str, lines: Sequence[str], links: Mapping[str, str]) -> None:
    """Log a notice.

    Args:
        title: the news in a few words.
        lines: what there is to know.
        links: text -> URL.
    """
    text = "; ".join([title, *lines, *(f"{name} {url}" for name, url in links.items())])
    logging.getLogger(__name__).warning(text)
