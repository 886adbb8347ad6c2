"""Measure time and memory of dense, masked and block-sparse twins, which take turns on this machine."""

from __future__ import annotations

import argparse
import json

from sparseift_llm.utils.outputs import user_path

# A pattern for the beginning of a result file, by which `refuse_foreign` knows files that this command may overwrite.
RESULT_BEGINNING = r'\{\s*"rows": \[\s*\{\s*"name": "\w+",\s*"level": "'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift bench`."""
    parser.add_argument(
        "--only",
        metavar="NAME",
        help="one row: ffn_fp32, ffn_bf16, step_cpu, residual_ffn_64, residual_ffn_128, residual_step_64, "
        "residual_step_128, ffn_gpu or step_gpu",
    )
    parser.add_argument("--crossover", action="store_true", help="FFNs of several widths and tiles instead")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each contestant")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=user_path, help="write the JSON object to this file as well")


def run(arguments: argparse.Namespace) -> str:
    """The measurements as a Markdown table, or as JSON."""
    import torch

    from sparseift_llm.bench.rows import CROSSOVER, ROWS
    from sparseift_llm.bench.run import bench
    from sparseift_llm.bench.tables import render, render_crossover
    from sparseift_llm.utils.files import write_json
    from sparseift_llm.utils.outputs import refuse_foreign
    from sparseift_llm.utils.words import check_choice

    if arguments.only is not None:
        check_choice("--only", arguments.only, tuple(ROWS))
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
    if arguments.output:
        refuse_foreign([arguments.output], RESULT_BEGINNING, "sparseift bench")
    here = [row for row in ROWS.values() if row.device == "cpu" or torch.cuda.is_available()]
    rows = CROSSOVER if arguments.crossover else [ROWS[arguments.only]] if arguments.only else here
    words = [f"--only {arguments.only}" if arguments.only else "", "--crossover" if arguments.crossover else ""]
    command = " ".join(filter(None, ["sparseift bench", *words, f"--repeats {arguments.repeats}"]))
    result = {**bench(rows, arguments.repeats), "command": command}
    if arguments.output:
        write_json(arguments.output, result)
    if arguments.json:
        return json.dumps(result, indent=2)
    return render_crossover(result) if arguments.crossover else render(result)
