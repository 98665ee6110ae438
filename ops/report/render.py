"""Templates to HTML: one file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from model.files import shown
from ops.text import storable

MOST_BYTES = 300_000  # of a page, whatever its rows hold and however many there are; a test enforces it


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder; all values are escaped unless they are Markup.

    Args:
        template: such as "report.html".
    """
    return storable(_environment().get_template(template).render(**values))


def write_page(file: Path, page: str) -> None:
    """Write a page.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"the page cannot be written to {shown(str(file))}: {error.strerror}. Name another file with --html"
        ) from error


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ops.report"),
        autoescape=True,  # rows are written by strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
