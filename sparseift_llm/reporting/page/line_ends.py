"""Names and last values beside a chart, at the height where their lines end, moved apart until none covers another.

They stand right of the box of the chart, in the padding that the style sheet leaves there. A dotted line leads to a
name from a line that ends before the right side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from scipy.optimize import isotonic_regression

from sparseift_llm.reporting.page.markup import element, short

_GAP = {False: 12.0, True: 8.5}  # percent of the height of a chart, or of a tall one, that two lines of text take
_RANGE = 3.0, 94.0  # where the middle of a text may be, so that it covers no number of the x axis
_LONGEST = 12  # letters that fit into the padding


@dataclass(frozen=True)
class End:
    """The end of a line.

    Args:
        name: to write there.
        value: the last value.
        colour: the style sheet's class for its colour.
        x, y: its place, in percent of the chart from the top left.
    """

    name: str
    value: float
    colour: str
    x: float
    y: float


def labelled_ends(ends: Sequence[End], is_tall: bool) -> list[Markup]:
    """The name and value of every line, with leaders; nothing where there are more of them than fit."""
    heights = spread([end.y for end in ends], _GAP[is_tall])
    if heights is None:
        return []
    parts = []
    for end, height in zip(ends, heights, strict=True):
        at = f"{height:.2f}%"
        if end.x < 99.5 or abs(height - end.y) > 2:
            parts.append(
                element("line", x1=f"{end.x:.2f}%", y1=f"{end.y:.2f}%", x2="100%", y2=at,
                        class_=f"leader {end.colour}")
            )  # fmt: skip
        words = (
            element("tspan", shortened(end.name), x="100%", dx="8", dy="-0.2em"),
            element("tspan", _in_words(end.value), x="100%", dx="8", dy="1.15em"),
        )
        parts.append(element("text", *words, y=at, class_=f"end {end.colour}"))
    return parts


def spread(heights: Sequence[float], gap: float) -> list[float] | None:
    """Heights within `_RANGE` that are at least `gap` apart, in the same order and moved as little as possible.

    None if so many do not fit. Less the multiple of the gap that their rank asks for, the new heights have to be
    ascending, which makes this an isotonic regression.
    """
    low, high = _RANGE
    if not heights or (len(heights) - 1) * gap > high - low:
        return None
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    ascending = isotonic_regression(np.asarray(heights, dtype=float)[order] - steps).x
    placed = np.empty(len(heights))
    placed[order] = np.clip(ascending, low, high - steps[-1]) + steps
    found: list[float] = placed.tolist()
    return found


def shortened(name: str) -> str:
    """A name of at most 12 letters: both ends of a longer one, because runs often differ in the last letters."""
    return name if len(name) <= _LONGEST else f"{name[:5]}\u2026{name[-(_LONGEST - 6) :]}"


def _in_words(value: float) -> str:
    """Four digits, or a whole number with commas."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else short(value, 4)
