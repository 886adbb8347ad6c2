"""Measures rows one after the other, and says on which machine, with which versions and at which commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparseift_llm.bench.layer import measure_layer
from sparseift_llm.bench.rows import Row
from sparseift_llm.bench.step import measure_step
from sparseift_llm.utils.provenance import commit, machine, versions


def bench(rows: Sequence[Row], repeats: int = 9) -> dict[str, Any]:
    """Measure `rows` one after the other.

    Args:
        rows: from `ROWS` or `CROSSOVER` in rows.py.
        repeats: timed turns of each contestant, after two turns that warm up.

    Returns:
        A JSON-serialisable mapping: `rows`, and the machine, versions and commit that they belong to. Times are medians
        in seconds.

    Raises:
        ValueError: a row needs a CUDA device and there is none.
    """
    for row in rows:
        if row.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{row.name} needs a CUDA device, and there is none here; choose another row with --only")
    measured = [measure_layer(row, repeats) if row.level == "layer" else measure_step(row, repeats) for row in rows]
    return {"rows": measured, "machine": machine(), "versions": versions(), "commit": commit()}
