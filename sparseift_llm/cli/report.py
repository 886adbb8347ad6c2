"""Write one self-contained HTML page about runs, whether they have finished or not."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparseift_llm.utils.outputs import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of `sparseift pretrain`, dense first")
    parser.add_argument("-o", "--output", type=user_path, default=Path("report.html"), help="the page to write")


def run(arguments: argparse.Namespace) -> str:
    """Write the page, and say in which state each run was found."""
    from sparseift_llm.reporting.page.page import write_report

    runs = write_report(arguments.runs, arguments.output)
    states = [f"{run.name}: {'; '.join([run.state, *run.reasons])}" for run in runs]
    return "\n".join([*states, f"wrote {arguments.output}"])
