"""Settings that are recommended for a goal. docs/guides/choose.md says what was measured of each.

`SparseIFTConfig.recommended` makes a config of them. A goal changes when a result file says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.config.families import Parallel, Wide

# Masks that never change have done as well as RigL for single weights, and better for tiles.
_STATIC = DSTConfig(algorithm="static")

GOALS: Mapping[str, Mapping[str, Any]] = {
    "dense_cost": {"family": Wide("ffn"), "structure": "block", "dst": _STATIC},
    "equal_flops": {"family": Wide("ffn"), "sparsity": 0.5, "structure": "unstructured", "dst": _STATIC},
    "balanced": {"family": Wide("model"), "structure": "block", "dst": _STATIC},
    "lowest_loss": {"family": Wide("model"), "structure": "unstructured", "dst": _STATIC},
    "from_trained": {"family": Parallel("none"), "init": "pretrained", "dst": _STATIC},
    "paper": {"family": Wide("model"), "structure": "unstructured", "dst": DSTConfig(algorithm="rigl")},
}
"""Goal -> arguments of `SparseIFTConfig`."""
