"""Line charts as inline SVG, laid out here and coloured by the style sheet.

A chart consists of two SVG elements. The outer one is as wide as the page leaves it, and everything in it (numbers,
grid lines, markers) is placed in percent of it, so that text and markers keep their size at every width. The inner one
holds the curves in a box of 1000 by 1000 units, which the browser stretches to the outer one without keeping its
proportions; only lines survive that, and their width does not scale. Numbers along the axes are placed outside of the
outer box, at negative places or beyond 100%, in the padding that the style sheet leaves around it.

Lines are told apart by colour, dash and marker. Why no plotting library draws this is in docs/developers/decisions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from sparseift_llm.reporting.page.line_ends import End, labelled_ends
from sparseift_llm.reporting.page.markup import element
from sparseift_llm.utils.units import unit_at

NUM_STYLES = 6
_SIZE = 1000  # width and height of the box that curves are drawn in, before it is stretched to the chart
_SCALES = {3: "thousands", 6: "millions", 9: "billions"}
_TIMES_TEN = "\u00d710"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
MARKERS = (  # circle, square, triangle, diamond, cross, star; centred, about 8 wide
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l4.5 8h-9z",
    "M0-5l4.5 5-4.5 5-4.5-5z",
    "M-4-2l2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z",
    "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
)


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        label: its name in the legend and in the description of the figure.
        style: the number of its run, which decides colour, dash and marker.
        points: pairs (x, y). A y that is not finite leaves a gap.
        is_main: whether the line is thick and has markers; otherwise it is thin and has none.
        end: the name that is written where the line ends, with its last value; None writes nothing.
    """

    label: str
    style: int
    points: Sequence[tuple[float, float]]
    is_main: bool = True
    end: str | None = None

    @property
    def finite(self) -> list[tuple[float, float]]:
        """Its points without those that leave gaps."""
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True)
class Axis:
    """A range and the numbers printed along it."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str

    def share(self, value: float) -> float:
        """Where `value` stands between the ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def style_class(style: int) -> str:
    """The style sheet's classes for colour (`s0` to `s5`) and dash (`d0` to `d5`).

    Each time the colours have been through, the dashes move on by one, so that the first 36 styles all differ.
    """
    turn = style // NUM_STYLES
    return f"s{style % NUM_STYLES} d{(style + turn) % NUM_STYLES}"


def marker_of(style: int) -> str:
    """A reference to the marker of a run; it moves on by two whenever the dashes move on by one."""
    return f"#mark-{(style + 2 * (style // NUM_STYLES)) % NUM_STYLES}"


def make_axis(low: float, high: float, label: str, num_ticks: int = 5, unit: str | None = None) -> Axis:
    """An axis from `low` to `high` with round numbers along it.

    Very large and very small numbers are divided by a power of 1000, which the label then says, in the prefix of `unit`
    where one is given (see `unit_at`). Limits that are equal, or so close that ticks could not be told apart, are moved
    apart.
    """
    # Written as "not above", so that limits of 0 and 0 are moved apart, too.
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / num_ticks)
    largest = max(abs(low), abs(high))
    # The power of ten that numbers are divided by: 1.2e7 is printed as 12 (millions). From 0.001 to 100,000 it is 0.
    power = 3 * (math.floor(math.log10(largest)) // 3) if largest >= 1e5 or largest < 1e-3 else 0
    if unit is not None:
        divisor, words = unit_at(largest, unit)
        power = round(math.log10(divisor))
        label = f"{label} ({words})"
    elif power:
        label = f"{label} ({_SCALES.get(power) or _TIMES_TEN + str(power).translate(_SUPERSCRIPTS)})"
    # As many decimals as the first digit of the printed step needs, and one more for steps of 2.5, 0.25, ...
    decimals = max(0, -math.floor(math.log10(step / 10.0**power) + 1e-9))
    if round(step / 10.0**power, decimals) != round(step / 10.0**power, decimals + 1):
        decimals += 1
    # Ticks are whole multiples of the step; 1e-9 keeps one that rounding has put just outside of the limits.
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = tuple((index * step, f"{index * step / 10.0**power:,.{decimals}f}") for index in numbers)
    return Axis(low, high, ticks, label)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def line_chart(
    chart_id: str,
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    starts_at_zero: bool = False,
    columns: Mapping[str, str] | None = None,
    x_low: float | None = None,
    x_unit: str | None = None,
    is_tall: bool = False,
) -> Markup | None:
    """A chart of all series, or None if there is no point to draw.

    Args:
        chart_id: unique in the page.
        title: of the figure.
        series: lines.
        x_label, y_label: what the axes show, with units.
        starts_at_zero: the y axis includes 0.
        columns: which columns of the figure's table hold `x` and `y`, for the script that reads values out.
        x_low: where the x axis begins; None: at the first point.
        x_unit: of the x axis, see `make_axis`.
        is_tall: whether the style sheet draws it taller, so that more names fit beside it.
    """
    points = [point for line in series for point in line.finite]
    if not points:
        return None
    x_values, y_values = [x for x, _ in points], [y for _, y in points]
    low, high = min(y_values), max(y_values)
    # A twentieth of the range stays free above the highest point, and below the lowest unless the axis starts at 0.
    margin = (high - low) * 0.05
    low, high = (min(low, 0.0) if starts_at_zero else low - margin), high + margin
    x_low = min(x_values) if x_low is None else min(x_low, *x_values)
    x, y = make_axis(x_low, max(x_values), x_label, unit=x_unit), make_axis(low, high, y_label)
    names = Markup("").join(
        [element("title", title, id=f"{chart_id}-t"), element("desc", _description(series, x, y), id=f"{chart_id}-d")]
    )
    box = {"viewBox": f"0 0 {_SIZE} {_SIZE}", "preserveAspectRatio": "none", "width": "100%", "height": "100%"}
    lines = element("svg", *(path for line in series for path in _lines(line, x, y)), **box)
    marks = [mark for line in series if line.is_main for mark in _marks(line, x, y)]
    labels = {"role": "img", "aria_labelledby": f"{chart_id}-t {chart_id}-d", "class_": "chart"}
    ends = [_end(line, x, y) for line in series if line.end is not None and line.finite]
    drawing = element("svg", names, *_grid(x, y), lines, *marks, *labelled_ends(ends, is_tall), **labels)
    around = element("p", y.label, class_="y-label"), drawing, element("p", x.label, class_="x-label")
    data = {f"data_{key}": value for key, value in (columns or {}).items()}
    return element("div", *around, class_="plot", data_low=x.low, data_high=x.high, **data)


def _description(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Where each line starts and ends, for readers who do not see it."""
    parts = []
    for line in series:
        if line.finite:
            parts.append(f"{line.label}: {line.finite[0][1]:.4g} at the start, {line.finite[-1][1]:.4g} at the end.")
    return f"Lines of {y.label} over {x.label}. {' '.join(parts)} The numbers are in the table below."


def _grid(x: Axis, y: Axis) -> list[Markup]:
    """Lines and numbers of both axes, in percent of the outer SVG, whose y grows downwards.

    The numbers of the y axis end 8 pixels left of the box. Those of the x axis stand one and a half lines below it.
    """
    parts = []
    for value, text in y.ticks:
        at = f"{100 * (1 - y.share(value)):.2f}%"
        parts.append(element("line", x1="0", x2="100%", y1=at, y2=at, class_="zero" if value == 0 else "gridline"))
        parts.append(element("text", text, x="-8", y=at, dy="0.35em", text_anchor="end"))
    for value, text in x.ticks:
        at = f"{100 * x.share(value):.2f}%"
        parts.append(element("line", x1=at, x2=at, y1="100%", y2="101.5%", class_="axis"))
        parts.append(element("text", text, x=at, y="100%", dy="1.5em", text_anchor="middle"))
    return [*parts, element("line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis")]


def _lines(line: Series, x: Axis, y: Axis) -> list[Markup]:
    """A polyline for every stretch without gaps, in the units of the inner SVG.

    A point without neighbours is drawn twice: a line of length 0 with round ends is a dot.
    """
    stretches: list[list[str]] = [[]]
    for value, height in line.points:
        if math.isfinite(height):
            stretches[-1].append(f"{_SIZE * x.share(value):.4g},{_SIZE * (1 - y.share(height)):.4g}")
        else:
            stretches.append([])
    width = "main" if line.is_main else "thin"
    return [
        element("polyline", points=" ".join(points * 2 if len(points) == 1 else points),
                class_=f"line {width} {style_class(line.style)}")
        for points in stretches
        if points
    ]  # fmt: skip


def _marks(line: Series, x: Axis, y: Axis, most: int = 12) -> list[Markup]:
    """Markers on at most `most` points, spread evenly; they stand in the outer SVG, where nothing is stretched."""
    finite = line.finite
    most = min(most, len(finite))
    chosen = sorted({round(place) for place in np.linspace(0, len(finite) - 1, most).tolist()})
    return [
        element("use", href=marker_of(line.style), class_=f"mark {style_class(line.style)}",
                x=f"{100 * x.share(finite[index][0]):.2f}%", y=f"{100 * (1 - y.share(finite[index][1])):.2f}%")
        for index in chosen
    ]  # fmt: skip


def _end(line: Series, x: Axis, y: Axis) -> End:
    """Where a line ends, and what is written there."""
    at, value = line.finite[-1]
    return End(line.end or "", value, style_class(line.style).split()[0], 100 * x.share(at), 100 * (1 - y.share(value)))


def downsampled(values: Sequence[float], limit: int) -> list[int]:
    """Choose which of `values` to draw: all of them, or the extremes of equal stretches and both ends.

    Keeping the smallest and the largest value of every stretch keeps each spike of a curve, which taking every n-th
    value would lose.

    Args:
        values: y values in order. Of neighbours that are not finite the first is kept, because it makes a gap.
        limit: about how many values to keep.

    Returns:
        Ascending indices, at most `limit` of finite values.
    """
    array = np.asarray(values, dtype=float)
    lost = ~np.isfinite(array)
    gaps = np.flatnonzero(lost & ~np.concatenate([[False], lost[:-1]]))
    finite = np.flatnonzero(~lost)
    if len(finite) > limit:
        kept = [finite[0], finite[-1]]
        for part in np.array_split(finite, (limit - 2) // 2):
            kept += [part[array[part].argmin()], part[array[part].argmax()]]
        finite = np.unique(kept)
    return sorted({*map(int, gaps), *map(int, finite)})
