"""Train a recipe over a grid of settings and seeds, and say which setting is best.

Every field of the recipe can be given after it; `sparseift pretrain --help` lists them. One with several values,
`--learning_rate 4e-3,8e-3`, is an axis of the grid; the others hold for all runs. Each run is a process with a folder
and a log of its own in the folder --output. A sweep that was stopped goes on where it was, and one that is given more
values runs only what is missing. The result is printed and written there as sweep.json, sweep.md and sweep.png. The
exit status is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import logging

from sparseift_llm.utils.outputs import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift sweep`; fields of the recipe are checked with the recipe."""
    parser.usage = "sparseift sweep [-h] RECIPE.yaml [options] [--FIELD VALUE[,VALUE ...] ...]"
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe file")
    output = "the folder to write (default: the recipe's output_dir with _sweep after it)"
    parser.add_argument("-o", "--output", type=user_path, metavar="FOLDER", help=output)
    parser.add_argument("--seeds", type=_seeds, metavar="SEED[,SEED ...]", help="default: the recipe's own, alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    parser.add_argument("--dense-twin", action="store_true", help="train every setting with sparse_ift: null as well")
    parser.add_argument("--no-picture", action="store_true", help="write no sweep.png, which needs matplotlib")


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, e.g. 0,1,2") from error


def run(arguments: argparse.Namespace) -> str:
    """Run what is missing of the grid, write the results, and return the table.

    Raises:
        ValueError: the user has to change the recipe, an option, or the output folder.
        SystemExit: with status 1 after the table is printed, if a run failed.
    """
    from sparseift_llm.reporting.sweep import check_output, write_sweep
    from sparseift_llm.runs.sweep import run_sweep
    from sparseift_llm.runs.sweep_plan import plan_sweep

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sweep = plan_sweep(
        arguments.recipe,
        arguments.overrides,
        output=arguments.output,
        seeds=arguments.seeds,
        dense_twin=arguments.dense_twin,
    )
    has_picture = not arguments.no_picture
    check_output(sweep, has_picture)
    outcomes = run_sweep(sweep, arguments.jobs)
    text = write_sweep(sweep, outcomes, has_picture)
    if any(outcome.failure for outcome in outcomes):
        print(text)
        raise SystemExit(1)
    return text
