"""Put models side by side: finished runs, or the results of evaluations.

Folders are runs of `sparseift pretrain`, or output folders of a Trainer. They give a table of their summaries and a
picture of their loss curves.
Files are results of `sparseift evaluate`. They give a table of their scores, with intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseift_llm.utils.files import write_text
from sparseift_llm.utils.outputs import refuse_foreign, user_path

_EXAMPLES = """\
examples:
  sparseift compare runs/dense runs/sparse --output runs/comparison
  sparseift compare runs/dense/eval_v1.json runs/sparse/eval_v1.json
  sparseift compare dense=d0.json,d1.json sparse=s0.json,s1.json --output runs/evaluation

A comma joins the files of several training seeds. The first is what the others are compared to.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift compare`."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "given", nargs="+", metavar="RUN_OR_FILE", help="folders of runs, or [NAME=]F.json[,G.json] of evaluations"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="PATH",
        help="of runs: the folder for comparison.md and loss.png, needed; of evaluations: write PATH.md and PATH.json",
    )
    parser.add_argument("--samples", type=int, help="of evaluations: resamples of the items (default 2000)")
    parser.add_argument("--confidence", type=float, help="of evaluations: that of the intervals (default 0.95)")


def run(arguments: argparse.Namespace) -> str:
    """The table, which is written as well if an output is given.

    Raises:
        ValueError: runs and evaluations are mixed, or an option is for the other kind.
    """
    files = [word for word in arguments.given if word.endswith(".json") and not Path(word).is_dir()]
    if not files:
        return _compare_runs(arguments)
    if len(files) < len(arguments.given):
        other = next(word for word in arguments.given if word not in files)
        raise ValueError(
            f"{other} is taken for a run and {files[0]} for the result of an evaluation, and they cannot be compared; "
            "give folders of runs only, or files F.json only"
        )
    return _compare_evaluations(arguments)


def _compare_runs(arguments: argparse.Namespace) -> str:
    from sparseift_llm.reporting.comparison import COMPARISON_BEGINNING, COMPARISON_NAME, comparison_table
    from sparseift_llm.reporting.loss_picture import PICTURE_NAME, loss_picture

    for option in ("samples", "confidence"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for results of evaluations, F.json; leave it out for folders of runs")
    if arguments.output is None:
        raise ValueError("--output is missing: say in which folder comparison.md and loss.png are written")
    output = arguments.output
    path, picture = output / COMPARISON_NAME, output / PICTURE_NAME
    refuse_foreign([path, picture], COMPARISON_BEGINNING, "sparseift compare")
    table = comparison_table(arguments.given)
    write_text(path, table)
    loss_picture(arguments.given, picture)
    return f"{table}\nwrote {path} and {picture}"


def _compare_evaluations(arguments: argparse.Namespace) -> str:
    from sparseift_llm.evaluation.comparison_command import main

    words = list(arguments.given)
    for option in ("output", "samples", "confidence"):
        value = getattr(arguments, option)
        words += [] if value is None else [f"--{option}", str(value)]
    main(words)  # which prints the table itself
    return ""
