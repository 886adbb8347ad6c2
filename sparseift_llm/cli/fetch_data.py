"""Download the data sets of a suite into a folder for `sparseift evaluate --data-dir`."""

from __future__ import annotations

import argparse


def run(arguments: argparse.Namespace) -> str:
    """Hand over to the command line that downloads, which prints by itself.

    Raises:
        ValueError: lm-eval is not installed.
    """
    try:
        from sparseift_llm.evaluation.fetch_command import main
    except ImportError as error:
        raise ValueError(f"lm-eval is needed: pip install 'sparseift_llm[eval]' ({error})") from error
    main(arguments.words, "sparseift fetch-data")
    return ""
