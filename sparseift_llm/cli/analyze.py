"""Compute spectral quantities of the sparse matrices in the checkpoints of runs, and how they correlate with loss."""

from __future__ import annotations

import argparse
import logging

from sparseift_llm.utils.outputs import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift analyze`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of `sparseift pretrain` or of a Trainer")
    parser.add_argument(
        "--output", type=user_path, required=True, help="folder for analysis.json, analysis.csv, pictures"
    )
    parser.add_argument("--every-nth-layer", type=int, default=1, metavar="N", help="take decoder layers 0, N, 2N, ...")


def run(arguments: argparse.Namespace) -> str:
    """Write the analysis; the table is printed before the pictures are drawn."""
    from sparseift_llm.analysis.across_runs import analyze
    from sparseift_llm.analysis.pictures import ALONG_TRAINING_NAME, CORRELATIONS_NAME, draw
    from sparseift_llm.analysis.results import ANALYSIS_BEGINNING, ANALYSIS_NAME, TABLE_NAME
    from sparseift_llm.analysis.tables import render
    from sparseift_llm.utils.outputs import refuse_foreign

    names = (ANALYSIS_NAME, TABLE_NAME, ALONG_TRAINING_NAME, CORRELATIONS_NAME)
    refuse_foreign([arguments.output / name for name in names], ANALYSIS_BEGINNING, "sparseift analyze")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparseift_llm").setLevel(logging.INFO)
    result = analyze(arguments.runs, arguments.output, arguments.every_nth_layer)
    print(render(result))
    pictures = draw(result, arguments.output)
    return f"\nwrote {', '.join(map(str, [*sorted(arguments.output.glob('analysis.*')), *pictures]))}"
