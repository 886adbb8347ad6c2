"""The pictures of docs/families.md: the dense matrix and what a family puts in its place, at 75% and at one scale.

`python -m tests.docs.family_pictures` writes them; a test compares, and counts that every picture has as many coloured
cells as its dense matrix. A cell is one weight. Vectors stand as bars, and what is multiplied stands between them.
"""

from __future__ import annotations

import random
from html import escape
from pathlib import Path

from tests.helpers.paths import ROOT

FOLDER = ROOT / "docs" / "families"
CELL = 6  # pixels
D = 8  # the width of the dense model, in cells
ACTIVE = D * D
_MIDDLE = 130  # the height that inputs and outputs are centred at
_GREY, _BLUE, _GREEN = "#808080", "#4c8dd6", "#4caf6d"  # greys that both a light and a dark page show
_HEAD = (
    '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
    f'<path d="M0 0L8 4L0 8z" fill="{_GREY}"/></marker>'
)


class Picture:
    """An SVG that grows to the right."""

    def __init__(self, title: str, about: str) -> None:
        self.title, self.about = title, about
        self.parts: list[str] = []
        self.random = random.Random(0)

    def text(self, x: float, y: float, words: str, size: int = 12) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="{_GREY}" '
            f'font-family="sans-serif">{escape(words)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.parts.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{_GREY}" stroke-width="1.3" fill="none" '
            'marker-end="url(#a)"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str = "none", opacity: float = 0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{_GREY}" stroke-width="1.3"/>'
        )

    def vector(self, x: float, cells: int, name: str, width: str, middle: float = _MIDDLE) -> None:
        """A bar of so many cells, its name above and its width below."""
        height = cells * CELL
        self.box(x, middle - height / 2, 10, height, _BLUE, 0.3)
        if name:
            self.text(x + 5, middle - height / 2 - 6, name)
        self.text(x + 5, middle + height / 2 + 14, width)

    def matrix(self, x: float, middle: float, rows: int, columns: int, active: int, words: str, above: str) -> None:
        """A matrix with `active` coloured cells, the left edge at `x`; `words` below it."""
        top = middle - rows * CELL / 2
        places = [(row, column) for row in range(rows) for column in range(columns)]
        for row, column in sorted(self.random.sample(places, active)):
            self.parts.append(
                f'<rect class="cell" x="{x + column * CELL:g}" y="{top + row * CELL:g}" width="{CELL}" '
                f'height="{CELL}" fill="{_BLUE}" fill-opacity="0.8"/>'
            )
        self.box(x, top, columns * CELL, rows * CELL)
        centre = x + columns * CELL / 2
        if above:
            self.text(centre, top - 6, above)
        if words:
            self.text(centre, top + rows * CELL + 14, words)

    def function(self, x: float, middle: float) -> None:
        """What may stand between matrices."""
        self.parts.append(
            f'<circle cx="{x:g}" cy="{middle:g}" r="10" fill="{_GREEN}" fill-opacity="0.5" stroke="{_GREY}" '
            'stroke-width="1.3"/>'
        )
        self.text(x, middle + 4, "g")

    def sum(self, x: float, height: float) -> None:
        """A bar that adds what arrows bring to it, each at a height of its own."""
        self.box(x, _MIDDLE - height / 2, 20, height)
        self.text(x + 10, _MIDDLE + 5, "+", 14)

    def dense(self) -> None:
        """The dense projection, at the left of every picture."""
        self.text(88, 18, "dense")
        self.vector(20, D, "x", "D")
        self.arrow(34, _MIDDLE, 58, _MIDDLE)
        self.matrix(62, _MIDDLE, D, D, ACTIVE, "D x D", "W")
        self.arrow(114, _MIDDLE, 138, _MIDDLE)
        self.vector(142, D, "y", "D")
        self.parts.append(f'<path d="M185 30L185 230" stroke="{_GREY}" stroke-width="1" stroke-dasharray="2 4"/>')

    def svg(self) -> str:
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 260" width="600" height="260" role="img" '
            f'aria-labelledby="t d"><title id="t">{escape(self.title)}</title><desc id="d">{escape(self.about)}</desc>'
            f"<defs>{_HEAD}</defs>{''.join(self.parts)}</svg>\n"
        )


def wide() -> Picture:
    picture = Picture("Wide", "A dense matrix beside one of twice its sides with a quarter of its entries filled")
    picture.dense()
    picture.text(390, 18, "Wide, 75%: both sides doubled, a quarter of the weights active")
    picture.vector(290, 2 * D, "x", "2D")
    picture.arrow(304, _MIDDLE, 336, _MIDDLE)
    picture.matrix(340, _MIDDLE, 2 * D, 2 * D, ACTIVE, "2D x 2D", "W")
    picture.arrow(440, _MIDDLE, 472, _MIDDLE)
    picture.vector(476, 2 * D, "y", "2D")
    return picture


def parallel() -> Picture:
    picture = Picture("Parallel", "A dense matrix beside four branches, each with a quarter of its entries filled")
    picture.dense()
    picture.text(390, 18, "Parallel, 75%: four branches, a quarter of each active")
    picture.vector(220, D, "x", "D")
    for branch in range(4):
        middle = 50 + branch * 54
        apart = (branch - 1.5) * 12  # where arrows leave and land, so that no two heads touch
        picture.arrow(234, _MIDDLE + apart, 306, middle)
        picture.matrix(310, middle, D, D, ACTIVE // 4, "", "")
        picture.arrow(362, middle, 394, middle)
        picture.function(408, middle)
        picture.arrow(420, middle, 486, _MIDDLE + 1.5 * apart)
    picture.text(334, 252, "W1 ... W4, D x D each")
    picture.sum(490, 80)
    picture.arrow(514, _MIDDLE, 546, _MIDDLE)
    picture.vector(550, D, "y", "D")
    return picture


def factorized() -> Picture:
    picture = Picture("Factorized", "A dense matrix beside two factors around a side of twice its width")
    picture.dense()
    picture.text(390, 18, "Factorized, 75%: a side of 2D within, a quarter of each active")
    picture.vector(220, D, "x", "D")
    picture.arrow(234, _MIDDLE, 256, _MIDDLE)
    picture.matrix(260, _MIDDLE, 2 * D, D, ACTIVE // 2, "2D x D", "U")
    picture.arrow(312, _MIDDLE, 332, _MIDDLE)
    picture.vector(336, 2 * D, "", "2D")
    picture.arrow(350, _MIDDLE, 366, _MIDDLE)
    picture.function(380, _MIDDLE)
    picture.arrow(392, _MIDDLE, 416, _MIDDLE)
    picture.matrix(420, _MIDDLE, D, 2 * D, ACTIVE // 2, "D x 2D", "V")
    picture.arrow(520, _MIDDLE, 544, _MIDDLE)
    picture.vector(548, D, "y", "D")
    return picture


def doped() -> Picture:
    rank = 3 * D // 8  # s D / 2 at 75%
    picture = Picture("Doped", "A dense matrix beside a sparse one of its size and a dense pair of low rank")
    picture.dense()
    picture.text(390, 18, "Doped, 75%: a quarter active, and a dense pair of rank 3/8 D")
    picture.vector(220, D, "x", "D")
    picture.arrow(234, _MIDDLE - 10, 296, 80)
    picture.matrix(300, 80, rank, D, rank * D, "3/8 D x D", "U")
    picture.arrow(352, 80, 372, 80)
    picture.vector(376, rank, "", "3/8 D", 80)
    picture.arrow(390, 80, 422, 80)
    picture.matrix(426, 80, D, rank, rank * D, "D x 3/8 D", "V")
    picture.arrow(448, 80, 486, _MIDDLE - 16)
    picture.arrow(234, _MIDDLE + 10, 336, 190)
    picture.matrix(340, 190, D, D, ACTIVE // 4, "D x D", "W")
    picture.arrow(392, 190, 486, _MIDDLE + 16)
    picture.sum(490, 60)
    picture.arrow(514, _MIDDLE, 546, _MIDDLE)
    picture.vector(550, D, "y", "D")
    return picture


PICTURES = {make.__name__: make for make in (wide, parallel, factorized, doped)}


def write(folder: Path = FOLDER) -> None:
    """Write all pictures."""
    for name, make in PICTURES.items():
        (folder / f"{name}.svg").write_text(make().svg(), encoding="utf-8")


if __name__ == "__main__":
    write()
