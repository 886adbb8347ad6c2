"""Tables as Markdown and for terminals."""

from __future__ import annotations

import pytest

from sparseift_llm.utils.tables import markdown_table, terminal_table


def test_a_markdown_table_is_what_it_says() -> None:
    table = markdown_table(["", "dense", "sparse"], [["loss", "2.0000", 1], ["a long title", "", "-"]], "lrr")
    assert table == (
        "|  | dense | sparse |\n"
        "| --- | ---: | ---: |\n"
        "| loss | 2.0000 | 1 |\n"
        "| a long title |  | - |"
    )  # fmt: skip


def test_numbers_are_left_as_they_were_written() -> None:
    table = markdown_table(["a", "b"], [["1e3", "0.50"], ["007", "1,000"]], "lr")
    assert table.splitlines()[2:] == ["| 1e3 | 0.50 |", "| 007 | 1,000 |"]


def test_a_table_may_have_no_rows() -> None:
    assert markdown_table(["a", "b"], [], "rl") == "| a | b |\n| ---: | --- |"


def test_cells_cannot_break_the_table() -> None:
    table = markdown_table(["a|b"], [["left | right\nnext"]], "l")
    assert table.splitlines() == [r"| a\|b |", "| --- |", r"| left \| right next |"]


def test_a_table_for_a_terminal_has_aligned_columns() -> None:
    table = terminal_table(["kind", "layers"], [["q", 12], ["mlp_out", "3"], ["k", ""]])
    assert table.splitlines() == ["kind     layers", "q        12", "mlp_out  3", "k"]


@pytest.mark.parametrize(
    ("rows", "align", "message"),
    [
        ([["1"]], "lr", "the table has 2 columns, but a row has 1 cells"),
        ([["1", "2", "3"]], "lr", "the table has 2 columns, but a row has 3 cells"),
        ([], "l", "one letter, l or r, for each of the 2 columns"),
        ([], "lc", "one letter, l or r, for each of the 2 columns"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(rows: list[list[str]], align: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        markdown_table(["a", "b"], rows, align)
