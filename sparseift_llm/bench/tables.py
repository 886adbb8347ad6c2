"""Results of `sparseift bench` as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparseift_llm.utils.tables import markdown_table


def render(result: Mapping[str, Any]) -> str:
    """One line per row: times of the dense contestant, and those of the others and the floor in ratio to it.

    Beside them stands the rate of dense products in the same run, if the result has it: where they are slow, so is the
    dense contestant, and ratios are small.
    """
    header = ("what", "device, dtype", "tile", "tokens", "dense", "masked", "block", "floor", "dense products")
    cells = [
        (
            row["name"],
            f"{row['device']}, {row['dtype']}",
            row["tile"],
            row["tokens"],
            f"{row['dense_s'] * 1e3:.1f} ms",
            f"{row['ratio_masked']:.2f}x",
            f"{row['ratio_block']:.2f}x",
            f"{row['floor_s'] / row['dense_s']:.2f}x",
            f"{row['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s" if "gemm_flops_per_s" in row else "",
        )
        for row in result["rows"]
    ]
    return _without_empty(header, cells)


def _without_empty(header: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table without the last column if all of its cells are empty, as in results of older versions."""
    size = len(header) if any(row[-1] for row in cells) else len(header) - 1
    return markdown_table(header[:size], [row[:size] for row in cells], "llrrrrrrr"[:size])


def render_crossover(result: Mapping[str, Any]) -> str:
    """A result of `CROSSOVER` by width and tile: times of masked and block-sparse FFNs in ratio to the dense one."""
    ratios = {(row["hidden"], row["tile"]): row for row in result["rows"]}
    hiddens, tiles = (sorted({key[index] for key in ratios}) for index in (0, 1))
    header = ["dense hidden size", "masked", *(f"tile {tile}" for tile in tiles)]
    rows = []
    for hidden in hiddens:
        masked = statistics.median(ratios[hidden, tile]["ratio_masked"] for tile in tiles)
        rows.append([hidden, f"{masked:.2f}x", *(f"{ratios[hidden, tile]['ratio_block']:.2f}x" for tile in tiles)])
    return markdown_table(header, rows, "r" * len(header))
