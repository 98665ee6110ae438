"""The pages as HTML: escaped, self-contained, small, and legible in light and dark."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from finished_runs import HOSTILE, make_records

from ops.report.render import MOST_BYTES, render
from ops.tracking.finished import FinishedRun
from ops.tracking.report import report_page, run_lines
from ops.tracking.runs import RunRef

VOID = {"meta", "br", "img", "line", "circle", "rect", "polyline", "polygon"}
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "h4", "p", "a", "table", "caption",
    "thead", "tbody", "tr", "th", "td", "small", "span", "div", "figure", "figcaption", "svg", "line", "text",
    "polyline", "polygon", "circle", "rect", "article", "pre", "del", "ins", "dl", "dt", "dd",
}  # fmt: skip


# Texts with as many differences as there can be, between signs that HTML must escape.
NOISE = tuple("".join(random.Random(seed).choices('"&', k=2_000)) for seed in range(9))


class _Page(HTMLParser):
    """Elements and attributes of a page; closing tags must fit."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def hostile_run(rows: int) -> FinishedRun:
    """A run whose every text is hostile, with more of everything than a page shows."""
    evil = HOSTILE[0]
    return FinishedRun(
        ref=RunRef("http://127.0.0.1:5000", "1", "a" * 32),
        name=evil,
        asked=evil,
        status="FINISHED",
        started=datetime(2026, 1, 1, tzinfo=UTC),
        params={"model_size": evil, "dataset": HOSTILE[6], "seed": evil, f"data/dropped/{evil}": evil},
        metrics={},
        tags={"data_sha256": evil, "prefect.flow_run_url": "javascript:document.title='hacked'"},
        journal=[
            {"step": step, "time": 0, "metrics": {"train/loss": 3 / (1 + step), "eval/loss": 2.0}}
            for step in range(5_000)
        ],
        records=make_records(rows, texts=HOSTILE),
        files=[{"file": HOSTILE[6], "split": evil, "rows": 1}] * 500,
        changed={name: (HOSTILE[6], evil) for name in (evil, "dataset")},
    )


def page_of(run: FinishedRun) -> str:
    return report_page(run, run_lines(run))


def test_hostile_rows_add_no_element() -> None:
    """Only the template's own elements are there, with no address but those of the two servers."""
    page = _Page(page_of(hostile_run(60)))
    assert {tag for tag, _ in page.seen} <= ALLOWED
    for tag, attributes in page.seen:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")}
        if tag == "a":
            assert str(attributes["href"]).startswith("http://127.0.0.1:5000/")
    assert "a" in {tag for tag, _ in page.seen}, "an address was checked"
    policies = [a["content"] for tag, a in page.seen if tag == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("texts", [HOSTILE, (HOSTILE[7],), (HOSTILE[6],), NOISE])
def test_a_page_of_2003_rows_is_small(texts: tuple[str, ...]) -> None:
    """However many rows there are and whatever they hold: ten rows are shown, and their texts are cut."""
    run = hostile_run(2_003)
    run.records[:] = make_records(2_003, texts=texts)  # type: ignore[index]
    size = len(page_of(run).encode())
    assert 20_000 < size < MOST_BYTES


def test_a_long_family_is_cut() -> None:
    """It is a column of the data like the others."""
    run = hostile_run(20)
    for record in run.records or []:
        record["family"] = "&" * 100_000
    assert len(page_of(run).encode()) < MOST_BYTES


def test_a_page_needs_nothing_from_elsewhere() -> None:
    for template in (Path(__file__).parents[3] / "ops" / "report" / "templates").iterdir():
        text = template.read_text()
        for word in ("<script", "<link", "<img", "@import", "url(", "src="):
            assert word not in text, template


def test_headings_and_tables_can_be_read_by_machines() -> None:
    """One h1, no level left out; each table has column headers, each row its own; pictures have a text."""
    page = _Page(page_of(hostile_run(60)))
    levels = [int(tag[1]) for tag, _ in page.seen if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert {attributes.get("scope") for tag, attributes in page.seen if tag == "th"} == {"col", "row"}
    pictures = [attributes for tag, attributes in page.seen if tag == "svg"]
    assert len(pictures) == 3
    assert all(each["role"] == "img" and each["aria-label"] for each in pictures)
    assert [a for tag, a in page.seen if tag == "html"] == [{"lang": "en"}]


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(digit * 2 for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag(scheme: str) -> None:
    """4.5 for text (WCAG 2.2, 1.4.3), 3 for lines of pictures (1.4.11), in both schemes."""
    style = (Path(__file__).parents[3] / "ops" / "report" / "templates" / "page.html").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours: dict[str, Any] = dict(re.findall(r"--(\w+): (#\w+)", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--(\w+): (#\w+)", dark))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(_luminance(colours[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for text in ("text", "quiet"):
        for ground in ("page", "panel"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for text, ground in (
        ("link", "page"),
        ("better", "page"),
        ("worse", "page"),
        ("text", "removed"),
        ("text", "added"),
    ):
        assert contrast(text, ground) >= 4.5, (text, ground)
    for line in ("first", "second", "better", "worse"):
        assert contrast(line, "page") >= 3, line


def test_a_missing_value_is_an_error() -> None:
    """A template that asks for something that it was not given does not show an empty place."""
    with pytest.raises(Exception, match="undefined"):
        render("report.html", title="x")
