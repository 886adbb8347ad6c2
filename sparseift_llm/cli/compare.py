"""Put finished runs side by side: a table of their summaries, and a picture of their loss curves."""

from __future__ import annotations

import argparse

from sparseift_llm.utils.outputs import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift compare`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of `sparseift pretrain`, dense first")
    parser.add_argument("--output", type=user_path, required=True, help="folder for comparison.md and loss.png")


def run(arguments: argparse.Namespace) -> str:
    """Write the table and the picture; the table is printed as well."""
    from sparseift_llm.reporting.comparison import (
        COMPARISON_BEGINNING,
        COMPARISON_NAME,
        PICTURE_NAME,
        comparison_table,
        loss_picture,
    )
    from sparseift_llm.utils.files import write_text
    from sparseift_llm.utils.outputs import refuse_foreign

    path, picture = (arguments.output / name for name in (COMPARISON_NAME, PICTURE_NAME))
    refuse_foreign([path, picture], COMPARISON_BEGINNING, "sparseift compare")
    table = comparison_table(arguments.runs)
    write_text(path, table)
    loss_picture(arguments.runs, picture)
    return f"{table}\nwrote {path} and {picture}"
