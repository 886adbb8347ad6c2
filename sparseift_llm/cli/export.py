"""Write a run's model as a stock dense one, which loads anywhere, or as its active weights alone."""

from __future__ import annotations

import argparse
import logging

from sparseift_llm.utils.outputs import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift export`."""
    parser.add_argument(
        "source", metavar="RUN", help="output folder of `sparseift pretrain`, or a checkpoint of a Trainer"
    )
    parser.add_argument("--format", required=True, help="dense (loads anywhere) or sparse (compact)")
    parser.add_argument("--output", type=user_path, required=True, help="new folder")


def run(arguments: argparse.Namespace) -> str:
    """Write the export, and say how large it is."""
    from sparseift_llm.api import export_run

    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparseift_llm").setLevel(logging.INFO)
    folder = export_run(arguments.source, arguments.output, arguments.format)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"wrote {folder}: {size / 1e6:,.2f} MB of weights and masks"
