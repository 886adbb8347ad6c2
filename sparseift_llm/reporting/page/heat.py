"""Heat maps as inline SVG: a row of cells per layer, one path per shade, so that large ones stay small files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sparseift_llm.reporting.page.markup import element, short

NUM_SHADES = 9
_ROW_HEIGHT = 14  # pixels
_CHARACTER = 6.3  # width of a character in the label of a row, pixels
_MOST_CHARACTERS = 26


@dataclass(frozen=True)
class HeatMap:
    """The values of a heat map and the words around it.

    Args:
        title: the title of the figure.
        unit: what the shade of a cell shows, for the legend.
        labels: one label per row.
        rows: the values of each row, which are spread over the whole width. A value that is None or not finite leaves
            its cell blank.
        ends: what is written below the first and the last column.
        low, high: the values of the lightest and the darkest shade. Values beyond them take the same shades.
    """

    title: str
    unit: str
    labels: Sequence[str]
    rows: Sequence[Sequence[float | None]]
    ends: tuple[str, str]
    low: float
    high: float


def draw(map_id: str, heat: HeatMap) -> Markup:
    """The map with its row labels, the ends of its x axis, and a legend of shades."""
    height = _ROW_HEIGHT * len(heat.rows)
    names = [_fitted(label) for label in heat.labels]
    width = math.ceil(_CHARACTER * max(map(len, names), default=0)) + 6
    labels = element(
        "g",
        *(element("text", label, y=_ROW_HEIGHT * (index + 1) - 3) for index, label in enumerate(names)),
        transform=f"translate({width - 6})",
    )
    num_columns = max(map(len, heat.rows), default=0)
    cells = element(
        "svg",
        element("title", heat.title, id=f"{map_id}-t"),
        element("desc", _description(heat), id=f"{map_id}-d"),
        *_cells(heat),
        role="img", aria_labelledby=f"{map_id}-t {map_id}-d", class_="cells", height=height,
        shape_rendering="crispEdges",
        viewBox=f"0 0 {max(num_columns, 1)} {max(len(heat.rows), 1)}", preserveAspectRatio="none",
    )  # fmt: skip
    texts = element("svg", labels, width=width, height=height, class_="row-labels", aria_hidden="true")
    ends = element("p", element("span", heat.ends[0]), element("span", heat.ends[1]), class_="ends")
    return element("div", texts, element("div", cells, ends, class_="heat-box"), class_="heat") + _legend(heat)


def shade(value: float | None, low: float, high: float) -> int | None:
    """The number of a value's shade, 0 to `NUM_SHADES - 1`; the middle one where all values are equal."""
    if value is None or not math.isfinite(value):
        return None
    if not high > low:
        return NUM_SHADES // 2
    return min(NUM_SHADES - 1, max(0, int(NUM_SHADES * (value - low) / (high - low))))


def _fitted(label: str) -> str:
    """A label that fits beside a map on a phone: its start and its end, with an ellipsis between.

    The table below the map has it whole.
    """
    return label if len(label) <= _MOST_CHARACTERS else f"{label[:9]}\u2026{label[10 - _MOST_CHARACTERS :]}"


def _cells(heat: HeatMap) -> list[Markup]:
    """One path per shade, in which neighbouring cells of equal shade in a row are one rectangle.

    All rows are as wide as the map, so that a row of fewer values has wider cells.
    """
    num_columns = max(map(len, heat.rows), default=0)
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(heat.rows):
        shades = [shade(value, heat.low, heat.high) for value in row]
        start = 0
        for x in range(1, len(shades) + 1):
            if x == len(shades) or shades[x] != shades[start]:
                found = shades[start]
                if found is not None:
                    left, right = (f"{num_columns * end / len(row):.5g}" for end in (start, x))
                    paths.setdefault(found, []).append(f"M{left} {y}H{right}v1H{left}z")
                start = x
    return [element("path", d="".join(paths[number]), class_=f"h{number}") for number in sorted(paths)]


def _description(heat: HeatMap) -> str:
    values = [value for row in heat.rows for value in row if value is not None and math.isfinite(value)]
    span = f"from {min(values):.4g} to {max(values):.4g}" if values else "none logged"
    return f"{len(heat.rows)} layers, one row each; {heat.unit}: {span}. The numbers are in the table below."


def _legend(heat: HeatMap) -> Markup:
    shades = [element("rect", x=index, y=0, width=1, height=1, class_=f"h{index}") for index in range(NUM_SHADES)]
    ramp = element("svg", *shades, class_="ramp", aria_hidden="true", viewBox=f"0 0 {NUM_SHADES} 1",
                   preserveAspectRatio="none", width=120, height=12)  # fmt: skip
    if heat.high > heat.low:
        scale = element("span", f"{short(heat.low, 3)} ", ramp, f" {short(heat.high, 3)}", class_="scale")
        return element("p", f"{heat.unit}: ", scale, class_="legend")
    return element("p", f"{heat.unit}: {short(heat.low, 3)} in every cell", class_="legend")
