"""Show what Sparse-IFT makes of a model: sizes, FLOPs, memory and time, before anything is built or trained.

What to plan is a recipe, or a model with options of the transformation. Their defaults are those of `SparseIFTConfig`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from sparseift_llm.utils.tables import terminal_table
from sparseift_llm.utils.units import readable_bytes, readable_count

if TYPE_CHECKING:
    from sparseift_llm.planning.planner import Plan
    from sparseift_llm.record.specs import LayerSpec, MatrixSpec
    from sparseift_llm.runs.planned import PlannedRun

_EXAMPLES = """\
examples:
  sparseift plan recipes/gpt3_small_wide75_rigl.yaml
  sparseift plan --model gpt3-small --sparsity 0.75 --seq-len 1024
  sparseift plan --model gpt3-small --compare "scope=ffn" "structure=block" "sparsity=0.5 structure=block"
"""
_OWN = ("seq_len",)  # of the config, with an argument of its own here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sparseift plan`; those of the transformation are taken from its config."""
    from sparseift_llm.config.describe import describe_options
    from sparseift_llm.config.transform import SparseIFTConfig
    from sparseift_llm.planning.devices import UTILIZATION

    parser.usage = "sparseift plan [-h] (RECIPE.yaml | --model MODEL) [options]"
    parser.epilog = _EXAMPLES
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="a recipe file")
    parser.add_argument("--model", help="preset, config.json, model folder or hub id")
    parser.add_argument(
        "--seq-len", type=int, help="tokens per sequence (default: the recipe's, else the model's longest)"
    )
    parser.add_argument(
        "--tokens", type=float, help="tokens of the training, e.g. 2e9 (default: the recipe's, else 1e9)"
    )
    parser.add_argument(
        "--utilization", type=float, help=f"share of a GPU's peak that training reaches (default {UTILIZATION})"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="SETTINGS",
        help="one table of several settings, each like 'scope=ffn sparsity=0.5'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("the transformation")
    for option in describe_options(SparseIFTConfig):
        last = option.name.rpartition(".")[2]
        if option.name not in _OWN:
            group.add_argument(
                *dict.fromkeys((f"--{last.replace('_', '-')}", f"--{last}")),
                dest=f"config.{option.name}",
                metavar="VALUE",
                nargs="+" if option.type.startswith("a list of ") and "mappings" not in option.type else None,
                help=f"{option.type}; default {option.default}".replace("%", "%%"),
            )


def run(arguments: argparse.Namespace) -> str:
    """The plan as tables, or as JSON.

    Raises:
        ValueError: neither a recipe nor a model is given, or one of them or an option is refused.
    """
    from sparseift_llm.reporting.plan_estimates import estimates_of, estimates_table, plans_table

    options = _options(arguments)
    settings = {words: {**options, **_settings(words)} for words in arguments.compare or [""]}
    planned = {words: _plan(arguments, values) for words, values in settings.items()}
    first = next(iter(planned.values()))
    num_tokens = arguments.tokens or first.num_tokens or 1e9
    if arguments.json:
        whole = {
            words: {
                **run.plan.to_dict(),
                **estimates_of(run.plan, num_tokens, arguments.utilization),
                **_memory(run.plan),
            }
            for words, run in planned.items()
        }
        return json.dumps(whole if arguments.compare else whole[""], indent=2)
    if arguments.compare:
        table = plans_table({words: run.plan for words, run in planned.items()}, num_tokens, arguments.utilization)
        return "\n".join([table, *first.notes])
    estimates = estimates_table(estimates_of(first.plan, num_tokens, arguments.utilization))
    return "\n".join([render_plan(first.plan), "", estimates, *_memory_table(first.plan), *first.notes])


def _memory(plan: Plan) -> dict[str, Any]:
    """What a wider residual stream keeps per token; nothing with other scopes."""
    from sparseift_llm.planning.memory import memory_of_plan

    return {"memory_values_per_token": memory_of_plan(plan)} if plan.config.scope == "residual" else {}


def _memory_table(plan: Plan) -> list[str]:
    """Which memory grows with a wider residual stream, and which does not."""
    lines = []
    for memory in _memory(plan).values():
        dense, sparse = memory["dense"], memory["sparse"]
        most = ", at most" if plan.config.structure == "block" else ""  # their FFN computes some again
        names = {"kv_cache": "KV cache", "activations": f"activations kept for the backward pass{most}"}
        rows = [(names[key], f"{dense[key]:,}", f"{sparse[key]:,}", f"{sparse[key] / dense[key]:.4f}") for key in names]
        lines += ["", terminal_table(("values per token", "dense", "sparse", "ratio"), rows)]
    return lines


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the transformation that were given, by dotted name."""
    from sparseift_llm.config.yaml_files import parse_yaml

    options: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        if name.startswith("config.") and value is not None:
            key = name.removeprefix("config.")
            words = value if isinstance(value, list) else [value]
            parsed = [parse_yaml(word, f"--{key}") for word in words]
            options[key] = parsed if isinstance(value, list) else parsed[0]
    return options


def _settings(text: str) -> dict[str, Any]:
    """The options of one word after --compare, `scope=ffn sparsity=0.5`, by dotted name."""
    from sparseift_llm.config.describe import describe_options
    from sparseift_llm.config.transform import SparseIFTConfig
    from sparseift_llm.config.yaml_files import parse_yaml
    from sparseift_llm.utils.words import check_choice

    names = {option.name.rpartition(".")[2]: option.name for option in describe_options(SparseIFTConfig)}
    options = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--compare {text!r}: {word!r} is not of the form option=value")
        check_choice("--compare", name, names)
        options[names[name]] = parse_yaml(value, f"--compare {name}")
    return options


def _plan(arguments: argparse.Namespace, options: dict[str, Any]) -> PlannedRun:
    from sparseift_llm.runs.planned import plan_model, plan_recipe

    if arguments.recipe is not None:
        return plan_recipe(arguments.recipe, options, arguments.model, arguments.seq_len)
    if arguments.model is None:
        raise ValueError("give a RECIPE.yaml, or a model with --model, e.g. --model gpt3-small")
    return plan_model(arguments.model, options, arguments.seq_len)


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
        values = (_readable(key, dense[key]), _readable(key, sparse[key]))
        totals.append((key, *values, f"{sparse[key] / dense[key]:.4f}"))
    note = "FLOPs: multiply-adds of projections, attention and logits; norms and elementwise work are left out."
    totals_table = terminal_table((f"per token, T={plan.seq_len}", "dense", "sparse", "ratio"), totals)
    return "\n".join([terminal_table(header, rows), "", totals_table, "", note])


def _readable(key: str, value: float) -> str:
    """A total with its unit, which its key in `ModelCost.to_dict` tells."""
    if "bytes" in key:
        return readable_bytes(value)
    return readable_count(value) + ("FLOP" if "flops" in key else "")


def _matrices(layer: LayerSpec) -> str:
    """What stands in the layer's place, e.g. `1536 x 768 + 768 x 1536`; dense parts are marked."""
    shapes = Counter(f"{matrix.shape[0]} x {matrix.shape[1]}" + _mark(layer, matrix) for matrix in layer.matrices)
    return " + ".join(f"{number} of {shape}" if number > 1 else shape for shape, number in shapes.items())


def _mark(layer: LayerSpec, matrix: MatrixSpec) -> str:
    return " (dense)" if layer.is_sparse and not matrix.is_sparse else ""
