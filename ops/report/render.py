"""Templates to HTML: one file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ops.text import storable

MOST_BYTES = 300_000  # of a page, whatever its rows hold and however many there are; a test enforces it


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder; all values are escaped unless they are Markup.

    Args:
        template: such as "report.html".
    """
    return storable(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ops.report"),
        autoescape=True,  # rows are written by strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
