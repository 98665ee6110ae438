"""The pictures: well-formed SVG that holds what was given, and little of it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from ops.report.pictures import Curve, curves, histogram, sorted_gains, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 2.4, [0, 0.5, 1, 1.5, 2]),
        (-0.3, 1, [0, 0.5, 1]),
        (0, 20_000, [0, 5_000, 10_000, 15_000, 20_000]),
        (3, 3, [3]),
        (0, 5e-324, [0]),
        (-1e308, 1e308, [-1e308]),
        (1e-9, 2e-9, [1e-9, 1.2e-9, 1.4e-9, 1.6e-9, 1.8e-9, 2e-9]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_curves_hold_their_points() -> None:
    """Lower losses are drawn lower, and both ends of a line lie at the ends of the axis."""
    made = curves([Curve("loss", [(0, 2.0), (10, 1.0), (20, 0.5)], "second")], "step", "loss", "A <title>")
    root = ElementTree.fromstring(str(made))
    assert root.get("aria-label") == "A <title>"
    (line,) = root.iter(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert [y for _, y in points] == sorted(y for _, y in points), "the y axis of SVG points down"
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)
    assert len(list(root.iter(f"{SVG}circle"))) == 3


def test_a_long_curve_is_averaged() -> None:
    """100,000 steps are a picture of some kilobytes, with the means of neighbouring steps."""
    points = [(float(step), 1.0 + step % 2) for step in range(100_000)]
    made = str(curves([Curve("loss", points, "second faint")], "step", "loss", "title"))
    assert len(made) < 10_000
    (line,) = ElementTree.fromstring(made).iter(f"{SVG}polyline")
    heights = {float(point.split(",")[1]) for point in line.get("points", "").split()}
    assert max(heights) - min(heights) < 1, "each point is the mean of the two values"


def test_infinite_points_are_left_out() -> None:
    made = str(curves([Curve("loss", [(0, math.inf), (1, 2.0), (2, math.nan)], "second")], "x", "y", "title"))
    assert "nan" not in made
    assert "inf" not in made


def test_nothing_is_no_picture() -> None:
    assert curves([Curve("loss", [], "second")], "x", "y", "title") is None
    assert sorted_gains([], "x", "y", "title") is None
    assert sorted_gains([math.nan], "x", "y", "title") is None
    assert histogram([], "x", "y", "title") is None


def test_gains_above_and_below_zero_are_two_areas() -> None:
    made = sorted_gains([-1.0, 2.0, 0.5], "rows", "gain", "title")
    above, below = ElementTree.fromstring(str(made)).iter(f"{SVG}polygon")
    (zero,) = (
        float(line.get("y1", ""))
        for line in ElementTree.fromstring(str(made)).iter(f"{SVG}line")
        if line.get("class") == "zero"
    )
    heights = [[float(point.split(",")[1]) for point in area.get("points", "").split()] for area in (above, below)]
    assert all(y <= zero for y in heights[0])
    assert min(heights[0]) < zero
    assert all(y >= zero for y in heights[1])
    assert max(heights[1]) > zero


def test_a_histogram_counts_every_value() -> None:
    made = histogram([1, 1, 1, 5, 9, 9], "tokens", "rows", "title")
    bars = list(ElementTree.fromstring(str(made)).iter(f"{SVG}rect"))
    heights = [float(bar.get("height", "")) for bar in bars]
    assert sum(heights) == pytest.approx(2 * max(heights), rel=0.01), "three of six values are in the highest bar"


def test_equal_values_are_drawn() -> None:
    assert "nan" not in str(histogram([7.0, 7.0], "tokens", "rows", "title"))
    assert "nan" not in str(curves([Curve("loss", [(3, 0.0)], "second")], "x", "y", "title"))
