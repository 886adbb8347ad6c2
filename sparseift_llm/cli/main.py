"""The `sparseift` command: argument parsing and printing; the work is done by the library."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparseift_llm.layers.composite import Part
from sparseift_llm.planning.planner import LayerPlan, Plan
from sparseift_llm.utils.outputs import in_words, refuse_foreign
from sparseift_llm.utils.tables import terminal_table

_BENCH_BEGINNING = r'\{\s*"rows": \[\s*\{\s*"name": "\w+",\s*"level": "'  # a pattern, see refuse_foreign


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        words: the command line without the program's name; default: the process's own.

    Returns:
        Exit status: 0, or 2 after an error message on stderr.
    """
    arguments = _parser().parse_args(words)
    try:
        print(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"sparseift: {in_words(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparseift", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="sizes, FLOPs and memory of a model before and after Sparse-IFT")
    plan.add_argument("--model", required=True, help="preset, config.json, model folder or hub id")
    plan.add_argument("--family", default="wide")
    plan.add_argument("--scope", default="model", help="model or ffn")
    plan.add_argument("--sparsity", type=float, required=True, help="zero fraction in [0, 1)")
    plan.add_argument("--structure", default="unstructured", help="unstructured or block")
    plan.add_argument("--block-size", type=int, help="side of a tile, with --structure block")
    plan.add_argument("--distribution", default="uniform", help="uniform or erk")
    plan.add_argument("--accounting", default="linears", help="linears or whole_model")
    plan.add_argument("--seq-len", type=int, required=True, help="tokens per sequence, for attention FLOPs")
    plan.add_argument("--targets", nargs="+", help="projection kinds to make sparse: q k v o mlp_in mlp_out")
    plan.add_argument("--exclude", nargs="+", default=[], help="projection kinds to leave dense")
    plan.add_argument("--width-multiple", type=int, default=1, help="round widths to multiples of this")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)
    compare = commands.add_parser("compare", help="a table and a loss picture of finished runs")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="output folders of recipes/pretrain.py, dense first")
    compare.add_argument("--output", type=Path, required=True, help="folder for comparison.md and loss.png")
    compare.set_defaults(run=_compare)
    export = commands.add_parser("export", help="a run's model as a stock dense one, or as active weights alone")
    export.add_argument("source", metavar="RUN", help="output folder of recipes/pretrain.py, or a Trainer's checkpoint")
    export.add_argument("--format", required=True, help="dense (loads anywhere) or sparse (compact)")
    export.add_argument("--output", type=Path, required=True, help="new folder")
    export.set_defaults(run=_export)
    analyze = commands.add_parser("analyze", help="spectral quantities of the checkpoints of runs, and correlations")
    analyze.add_argument("runs", nargs="+", metavar="RUN", help="output folders of recipes/pretrain.py or of a Trainer")
    analyze.add_argument("--output", type=Path, required=True, help="folder for analysis.json, analysis.csv, pictures")
    analyze.add_argument(
        "--every-nth-layer", type=int, default=1, metavar="N", help="take decoder layers 0, N, 2N, ..."
    )
    analyze.set_defaults(run=_analyze)
    report = commands.add_parser("report", help="one HTML page about runs, finished or not")
    report.add_argument("runs", nargs="+", metavar="RUN", help="output folders of recipes/pretrain.py, dense first")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page to write")
    report.set_defaults(run=_report)
    bench = commands.add_parser("bench", help="time and memory of dense, masked and block-sparse twins, side by side")
    bench.add_argument("--only", metavar="NAME", help="one row: ffn_fp32, ffn_bf16, step_cpu, ffn_gpu or step_gpu")
    bench.add_argument("--crossover", action="store_true", help="FFNs of several widths and tiles instead")
    bench.add_argument("--repeats", type=int, default=9, help="timed turns of each contestant")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.add_argument("--output", type=Path, help="write the JSON object to this file as well")
    bench.set_defaults(run=_bench)
    return parser


def _plan(arguments: argparse.Namespace) -> str:
    from sparseift_llm.config.transform import SparseIFTConfig
    from sparseift_llm.models.presets import load_config
    from sparseift_llm.planning.planner import plan

    config = SparseIFTConfig(
        family=arguments.family,
        scope=arguments.scope,
        sparsity=arguments.sparsity,
        structure=arguments.structure,
        block_size=arguments.block_size,
        distribution=arguments.distribution,
        accounting=arguments.accounting,
        seq_len=arguments.seq_len,
        targets=tuple(arguments.targets) if arguments.targets else None,
        exclude=tuple(arguments.exclude),
        width_multiple=arguments.width_multiple,
    )
    result = plan(load_config(arguments.model), config, arguments.seq_len)
    return json.dumps(result.to_dict(), indent=2) if arguments.json else render_plan(result)


def _compare(arguments: argparse.Namespace) -> str:
    from sparseift_llm.reporting.comparison import (
        COMPARISON_BEGINNING,
        COMPARISON_NAME,
        PICTURE_NAME,
        comparison_table,
        loss_picture,
    )

    path, picture = (arguments.output / name for name in (COMPARISON_NAME, PICTURE_NAME))
    refuse_foreign([path, picture], COMPARISON_BEGINNING, "sparseift compare")
    table = comparison_table(arguments.runs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path.write_text(table, encoding="utf-8")
    loss_picture(arguments.runs, picture)
    return f"{table}\nwrote {path} and {picture}"


def _export(arguments: argparse.Namespace) -> str:
    from sparseift_llm.checkpoints.export import export_run

    folder = export_run(arguments.source, arguments.output, arguments.format)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"wrote {folder}: {size / 1e6:,.2f} MB of weights and masks"


def _analyze(arguments: argparse.Namespace) -> str:
    from sparseift_llm.analysis.checkpoints import ANALYSIS_BEGINNING, ANALYSIS_NAME, TABLE_NAME, analyze, render
    from sparseift_llm.analysis.pictures import ALONG_TRAINING_NAME, CORRELATIONS_NAME, draw

    names = (ANALYSIS_NAME, TABLE_NAME, ALONG_TRAINING_NAME, CORRELATIONS_NAME)
    refuse_foreign([arguments.output / name for name in names], ANALYSIS_BEGINNING, "sparseift analyze")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparseift_llm").setLevel(logging.INFO)
    result = analyze(arguments.runs, arguments.output, arguments.every_nth_layer)
    print(render(result))
    pictures = draw(result, arguments.output)
    return f"\nwrote {', '.join(map(str, [*sorted(arguments.output.glob('analysis.*')), *pictures]))}"


def _report(arguments: argparse.Namespace) -> str:
    from sparseift_llm.reporting.page.page import write_report

    runs = write_report(arguments.runs, arguments.output)
    states = [f"{run.name}: {'; '.join([run.state, *run.reasons])}" for run in runs]
    return "\n".join([*states, f"wrote {arguments.output}"])


def _bench(arguments: argparse.Namespace) -> str:
    import torch

    from sparseift_llm.bench.rows import CROSSOVER, ROWS, bench, render, render_crossover
    from sparseift_llm.config.parsing import check_choice
    from sparseift_llm.utils.outputs import write_json

    if arguments.only is not None:
        check_choice("--only", arguments.only, tuple(ROWS))
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
    if arguments.output:
        refuse_foreign([arguments.output], _BENCH_BEGINNING, "sparseift bench")
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


def render_plan(plan: Plan) -> str:
    """The plan as a table per kind of layer and whole-model totals, for a terminal."""
    count = Counter((layer.kind, layer.dense_shape, _matrices(layer), layer.is_sparse) for layer in plan.layers)
    header = ("kind", "layers", "dense (out x in)", "sparse (out x in)", "sparsity", "active / dense weights")
    rows = []
    for (kind, dense_shape, matrices, is_sparse), number in count.items():
        group = [layer for layer in plan.layers if (layer.kind, _matrices(layer)) == (kind, matrices)]
        active = sum(layer.num_active for layer in group)
        size = sum(layer.num_weights for layer in group)
        rows.append(
            (
                kind,
                str(number),
                f"{dense_shape[0]} x {dense_shape[1]}",
                matrices,
                f"{1 - active / size:.5f}" if is_sparse else "dense",
                f"{active / (number * dense_shape[0] * dense_shape[1]):.4f}",
            )
        )
    totals = []
    dense, sparse = plan.dense.to_dict(), plan.sparse.to_dict()
    for key in dense:
        unit, scale = ("MFLOP", 1e6) if "flops" in key else ("MB", 1e6) if "bytes" in key else ("M", 1e6)
        values = (f"{dense[key] / scale:.2f} {unit}", f"{sparse[key] / scale:.2f} {unit}")
        totals.append((key, *values, f"{sparse[key] / dense[key]:.4f}"))
    note = "FLOPs: multiply-adds of projections, attention and logits; norms and elementwise work are left out."
    totals_table = terminal_table((f"per token, T={plan.seq_len}", "dense", "sparse", "ratio"), totals)
    return "\n".join([terminal_table(header, rows), "", totals_table, "", note])


def _matrices(layer: LayerPlan) -> str:
    """What stands in the layer's place, e.g. `1536 x 768 + 768 x 1536`; dense parts are marked."""
    shapes = Counter(f"{part.shape[0]} x {part.shape[1]}" + _mark(layer, part) for part in layer.matrices)
    return " + ".join(f"{number} of {shape}" if number > 1 else shape for shape, number in shapes.items())


def _mark(layer: LayerPlan, part: Part) -> str:
    return " (dense)" if layer.is_sparse and not part.is_sparse else ""
