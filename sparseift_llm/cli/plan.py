"""Show what Sparse-IFT makes of a model: sizes, FLOPs and memory, before anything is built or trained."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from sparseift_llm.utils.tables import terminal_table

if TYPE_CHECKING:
    from sparseift_llm.planning.planner import Plan
    from sparseift_llm.record.specs import LayerSpec, MatrixSpec


_OPTIONS = (
    "family",
    "scope",
    "sparsity",
    "structure",
    "block_size",
    "distribution",
    "accounting",
    "seq_len",
    "exclude",
    "width_multiple",
)  # that `plan` takes over as they are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift plan`."""
    parser.add_argument("--model", required=True, help="preset, config.json, model folder or hub id")
    parser.add_argument("--family", default="wide")
    parser.add_argument("--scope", default="model", help="model, ffn or residual")
    parser.add_argument("--embedding", help="with --scope residual: sparse or dense")
    parser.add_argument("--sparsity", type=float, required=True, help="zero fraction in [0, 1)")
    parser.add_argument("--structure", default="unstructured", help="unstructured or block")
    parser.add_argument("--block-size", type=int, help="side of a tile, with --structure block")
    parser.add_argument("--distribution", default="uniform", help="uniform or erk")
    parser.add_argument("--accounting", default="linears", help="linears or whole_model")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens per sequence, for attention FLOPs")
    parser.add_argument("--targets", nargs="+", help="projection kinds to make sparse: q k v o mlp_in mlp_out")
    parser.add_argument("--exclude", nargs="+", default=[], help="projection kinds to leave dense")
    parser.add_argument("--width-multiple", type=int, default=1, help="round widths to multiples of this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> str:
    """The plan as a table, or as JSON."""
    from sparseift_llm.config.transform import SparseIFTConfig
    from sparseift_llm.models.presets import load_config
    from sparseift_llm.planning.planner import plan

    values = {name: getattr(arguments, name) for name in _OPTIONS}
    if arguments.embedding is not None:
        values["embedding"] = arguments.embedding
    config = SparseIFTConfig.from_dict({**values, "targets": arguments.targets or None})
    result = plan(load_config(arguments.model), config, arguments.seq_len)
    return json.dumps(result.to_dict(), indent=2) if arguments.json else render_plan(result)


def render_plan(plan: Plan) -> str:
    """The plan as a table per kind of layer and whole-model totals, for a terminal."""
    count = Counter((layer.kind, layer.dense_shape, _matrices(layer), layer.is_sparse) for layer in plan.layers)
    header = ("kind", "layers", "dense (out x in)", "sparse (out x in)", "sparsity", "active / dense weights")
    rows = []
    for (kind, dense_shape, matrices, is_sparse), number in count.items():
        if kind == "logits" and not matrices:
            rows.append((kind, str(number), f"{dense_shape[0]} x {dense_shape[1]}", "the embedding's", "", ""))
            continue
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


def _matrices(layer: LayerSpec) -> str:
    """What stands in the layer's place, e.g. `1536 x 768 + 768 x 1536`; dense parts are marked."""
    shapes = Counter(f"{matrix.shape[0]} x {matrix.shape[1]}" + _mark(layer, matrix) for matrix in layer.matrices)
    return " + ".join(f"{number} of {shape}" if number > 1 else shape for shape, number in shapes.items())


def _mark(layer: LayerSpec, matrix: MatrixSpec) -> str:
    return " (dense)" if layer.is_sparse and not matrix.is_sparse else ""
