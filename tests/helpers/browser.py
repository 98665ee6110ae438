"""The system's Chromium, and pictures of its pages for docs/ where FINETUNE_SCREENSHOTS names a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
from made_up import ROOT
from PIL import Image  # a dependency of matplotlib

SCREENSHOTS = os.environ.get("FINETUNE_SCREENSHOTS")
# No request goes to other hosts than those of the tests. Chromium's sandbox does not work for root.
_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright; the test is skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (pip install -c constraints.txt -e '.[dev,pages]')",
    )
    with api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=[*_FLAGS, *sandbox])
        try:
            yield browser
        finally:
            browser.close()


def save_picture(page: Any, name: str, whole: bool = False) -> None:
    """Write what a page shows as NAME.png, if pictures are wanted.

    Args:
        whole: what does not fit the window, too.
    """
    if SCREENSHOTS:
        picture = Image.open(BytesIO(page.screenshot(full_page=whole)))
        picture.convert("RGB").quantize(64).save(ROOT / SCREENSHOTS / f"{name}.png", optimize=True)
