"""Score a run, a checkpoint or a hub model on a suite of tasks, in one process. eval/leaderboard.py takes several."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> str:
    """Hand over to the command line of evaluations, which prints by itself.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        from sparseift_llm.evaluation.command import main
    except ImportError as error:
        raise ValueError(f"lm-eval is needed: pip install 'sparseift_llm[eval]' ({error})") from error
    main(arguments.words, "sparseift evaluate")
    return ""
