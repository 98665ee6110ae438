"""Pictures of a page as inline SVG: curves, sorted gains, a histogram.

They are drawn by hand because matplotlib's SVG of the same pictures is ten times as large and has fixed colours. The
colours come from the page's style, so that they fit a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 440, 250  # of the viewBox: text of 12 units is legible on a page of 390 pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 40  # margins
_MOST_POINTS = 240  # of a curve; more are averaged in groups
_BARS = 24


@dataclass(frozen=True)
class Curve:
    """A line of a picture.

    Attributes:
        name: for the legend.
        points: (x, y), in the order of x.
        style: class of the page's style: "first" or "second", with "faint" for a curve of many points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str


@dataclass(frozen=True)
class _Axes:
    """The mapping from values to the viewBox."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / ((self.x_high - self.x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return (
            _HEIGHT - _BOTTOM - (value - self.y_low) / ((self.y_high - self.y_low) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        )

    def drawn(self, x_title: str, y_title: str) -> str:
        """Grid lines, the numbers beside them, and the titles of both axes."""
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for value in ticks(self.x_low, self.x_high):
            x = self.x(value)
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>'
            )
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        centre = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{centre}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
        parts.append(
            f'<text transform="rotate(-90)" x="{-middle}" y="12" text-anchor="middle">{escape(y_title)}</text>'
        )
        return "".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, some five of them; low alone where both are equal."""
    if not 1e-300 < high - low < math.inf:
        return [low]
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _picture(body: str, title: str) -> Markup:
    """An SVG with its title, which screen readers read."""
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_MOST_POINTS`` points, each the mean of a group of neighbours."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= _MOST_POINTS:
        return finite
    groups = np.array_split(np.array(finite), _MOST_POINTS)
    return [(float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)]


def curves(lines: Sequence[Curve], x_title: str, y_title: str, title: str) -> Markup | None:
    """Lines over one x axis; None where no line has a point.

    Args:
        title: what the picture shows, for readers who cannot see it.
    """
    drawn = [(line, _thinned(line.points)) for line in lines]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    if not xs:
        return None
    axes = _Axes(min(xs), max(xs), min(0.0, *ys), max(ys))
    parts = [axes.drawn(x_title, y_title)]
    for line, points in drawn:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if "faint" not in line.style:
            parts += [
                f'<circle class="dot {line.style}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.5"/>'
                for x, y in points
                if len(points) <= 40
            ]
    return _picture("".join(parts), title)


def sorted_gains(gains: Sequence[float], x_title: str, y_title: str, title: str) -> Markup | None:
    """One value for each row, the largest first, as areas above and below zero; None without rows.

    Args:
        gains: positive is better.
        title: what the picture shows, for readers who cannot see it.
    """
    ordered = sorted((gain for gain in gains if math.isfinite(gain)), reverse=True)
    if not ordered:
        return None
    points = _thinned([(index + 0.5, gain) for index, gain in enumerate(ordered)])
    axes = _Axes(0, len(ordered), min(0.0, ordered[-1]), max(0.0, ordered[0]))
    zero = axes.y(0)
    parts = [axes.drawn(x_title, y_title)]
    for style, limit in (("better", max), ("worse", min)):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(limit(y, 0.0)):.1f}" for x, y in points)
        parts.append(
            f'<polygon class="area {style}" points="{axes.x(0):.1f},{zero:.1f} {path} '
            f'{axes.x(len(ordered)):.1f},{zero:.1f}"/>'
        )
    parts.append(f'<line class="zero" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    return _picture("".join(parts), title)


def histogram(values: Sequence[float], x_title: str, y_title: str, title: str) -> Markup | None:
    """How often values fall into equal ranges; None without values."""
    if not values:
        return None
    counts, edges = np.histogram(np.asarray(values, dtype=np.float64), bins=_BARS)
    axes = _Axes(float(edges[0]), float(edges[-1]), 0, float(counts.max()))
    parts = [axes.drawn(x_title, y_title)]
    for count, left, right in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        top = axes.y(count)
        width = max(axes.x(right) - axes.x(left) - 1, 1)
        parts.append(
            f'<rect class="bar" x="{axes.x(left):.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{axes.y(0) - top:.1f}"/>'
        )
    return _picture("".join(parts), title)
