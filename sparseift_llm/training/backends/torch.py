"""Zeroing the per-element optimizer state of weights that a mask update changed.

Works on any torch optimizer: every state tensor of the parameter's shape is per-element state,
anything else has no entry to reset: step counts, and Adafactor's factored moments, which belong to
whole rows and columns of a weight or of each tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseift_llm.layers.sharding import local, part_of


@torch.no_grad()
def zero_state(optimizer: Optimizer, parameter: Tensor, positions: Tensor, name: str) -> None:
    """Set every per-element state of `parameter` to 0 at `positions`.

    Args:
        optimizer: the optimizer that owns `parameter`.
        parameter: a weight, whole or sharded; state is zeroed on the rank that owns it.
        positions: bool mask, broadcastable to its shape.
        name: the layer, for error messages.

    Raises:
        ValueError: per-element state that is not floating point (quantised optimizers), in which
            0 need not mean zero.
    """
    for key, state in optimizer.state.get(parameter, {}).items():
        if not isinstance(state, Tensor) or state.shape != parameter.shape:
            continue
        if not state.is_floating_point():
            raise ValueError(
                f"{name}: {type(optimizer).__name__} keeps {key!r} as {state.dtype}, which cannot be reset for "
                "grown weights; use an optimizer with floating-point state"
            )
        local(state).masked_fill_(part_of(positions, state), 0)
