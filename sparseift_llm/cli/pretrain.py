"""Train a dense model or its Sparse-IFT twin from a recipe file, in this process.

Every field of the recipe can be overridden after it: `--learning_rate 1e-3`, `--sparse_ift.sparsity 0.5`,
`--sparse_ift null`. Several processes are started by `accelerate launch recipes/pretrain.py RECIPE.yaml ...`.
"""

from __future__ import annotations

import argparse
import logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift pretrain`; overrides of recipe fields are checked with the recipe."""
    parser.usage = "sparseift pretrain [-h] RECIPE.yaml [--dry-run] [--FIELD VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take a few steps, save nothing, and say what training would take",
    )


def more_help() -> str:
    """The keys of a recipe, which are listed without loading torch."""
    from sparseift_llm.runs.recipe_help import recipe_help

    return recipe_help()


def run(arguments: argparse.Namespace) -> str:
    """Train, evaluate and save, and say where the summary is.

    Raises:
        ValueError: the recipe, its text, or the output folder has to be changed by the user.
        RuntimeError: training failed, from the error that it failed with.
    """
    from sparseift_llm.runs.dry_run import dry_run
    from sparseift_llm.runs.pretrain import finish, prepare_run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = [arguments.recipe, *arguments.overrides]
    if arguments.dry_run:
        return dry_run(words)
    run = prepare_run(words)
    try:
        return finish(run, ["sparseift", "pretrain", *words])
    except (ValueError, OSError) as error:  # not the user's words but the training: the whole traceback is of use
        raise RuntimeError(f"the training of {run.output_dir} failed: {error}") from error
