"""Tables as text, laid out by `tabulate`: Markdown for files and reports, aligned columns for a terminal.

What goes into a table is decided by its caller, which hands over finished words and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import TableFormat, tabulate

_ALIGNMENTS = {"l": "left", "r": "right"}
_RULES = {"l": "---", "r": "---:"}


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]], align: str) -> str:
    """A Markdown table, without a newline at its end.

    Cells are not padded to the width of their column, so that changing one cell changes one line of a file under
    version control. A `|` within a cell is escaped, and a line break in a cell becomes a space.

    Args:
        header: the titles of the columns.
        rows: the cells of each row, as many as there are titles.
        align: one letter for each column, `l` (left) or `r` (right).

    Raises:
        ValueError: `align` or a row has another number of columns than `header`, or `align` another letter.
    """
    cells = _checked(header, rows, align)
    rule = _line([_RULES[letter] for letter in align])
    return tabulate(
        [[_escaped(cell) for cell in row] for row in cells[1:]],
        [_escaped(title) for title in cells[0]],
        tablefmt=TableFormat(
            lineabove=None,
            linebelowheader=lambda widths, aligns: rule,
            linebetweenrows=None,
            linebelow=None,
            headerrow=_padded_line,
            datarow=_padded_line,
            padding=0,
            with_header_hide=None,
        ),
        colalign=[_ALIGNMENTS[letter] for letter in align],
        disable_numparse=True,
    )


def terminal_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table for a terminal: columns are aligned on the left, two spaces apart, and no line ends in a space.

    Raises:
        ValueError: a row has another number of columns than `header`.
    """
    cells = _checked(header, rows, "l" * len(header))
    text = tabulate(cells[1:], cells[0], tablefmt="plain", stralign="left", disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _checked(header: Sequence[object], rows: Iterable[Sequence[object]], align: str) -> list[list[str]]:
    """The header and the rows as strings, after a check that they fit each other."""
    if len(align) != len(header) or not set(align) <= _ALIGNMENTS.keys():
        raise ValueError(f"align={align!r} must hold one letter, l or r, for each of the {len(header)} columns")
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"the table has {len(header)} columns, but a row has {len(row)} cells: {row}")
    return cells


def _escaped(cell: str) -> str:
    return " ".join(cell.split("\n")).replace("|", r"\|")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _padded_line(cells: Sequence[str], widths: Sequence[int], aligns: Sequence[str]) -> str:
    """A line of the table from cells that tabulate has padded to `widths`."""
    return _line(cell.strip() for cell in cells)
