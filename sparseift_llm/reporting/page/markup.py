"""Escaped HTML and SVG elements, tables, and numbers in words; everything that a page prints goes through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sparseift_llm.runs.lenient_json import finite, number

NONE = "\u2013"  # printed where there is no value


@dataclass(frozen=True)
class Body:
    """Rows of a table that belong together.

    Args:
        rows: cells; the first of a row is its header.
        name: a heading above the rows, None for none.
    """

    rows: Sequence[Sequence[str]]
    name: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        caption: what it shows.
        header: a title for every column.
        bodies: its rows.
        is_words: cells are words rather than numbers, and stand to the left.
    """

    caption: str
    header: Sequence[str]
    bodies: Sequence[Body]
    is_words: bool = False

    @property
    def num_rows(self) -> int:
        """Rows without headings."""
        return sum(len(body.rows) for body in self.bodies)


def element(name: str, *children: str, **attributes: object) -> Markup:
    """`<name ...>children</name>`, everything escaped that is not `Markup`.

    Args:
        name: of the element.
        children: text or elements.
        attributes: `class_` stands for `class`, `stroke_width` for `stroke-width`; None leaves one out.
    """
    words = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), words, Markup("").join(map(escape, children)))


def short(value: object, digits: int = 6) -> str:
    """A number with so many significant digits, whole numbers in full; what is none as a dash, what is lost by name."""
    found = number(value)
    if found is None:
        return NONE
    if isinstance(found, int):
        return str(found)
    return f"{found:.{digits}g}"


def formatted(value: object, words: Callable[[float], str]) -> str:
    """A number in `words`, e.g. `"{:.4f}".format`; as `short` where they do not fit."""
    found = finite(value)
    try:
        return short(value) if found is None else words(found)
    except ValueError:
        return short(value)
