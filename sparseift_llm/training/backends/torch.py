"""torch's optimizers: their steps, and zeros in the state of weights that a mask update changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of
from sparseift_llm.training.backends.base import OptimizerBackend


class TorchBackend(OptimizerBackend):
    """A torch optimizer of whole weights, or of weights that FSDP2 has sharded.

    Args:
        optimizer: it is referred to weakly, because it holds what follows its steps, and a cycle would outlive a loop.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # whoever steps it holds it
        return optimizer

    def shares_optimizer(self, other: OptimizerBackend) -> bool:
        optimizer = self._optimizer()
        return isinstance(other, TorchBackend) and optimizer is not None and optimizer is other._optimizer()

    def follow_steps(self, after: Callable[..., None]) -> Callable[[], None]:
        return self.optimizer.register_step_post_hook(torch.compiler.disable(after)).remove

    def was_skipped(self) -> bool:
        # a gradient scaler steps a fused optimizer also when the step is to be skipped, and tells it so
        return bool(getattr(self.optimizer, "found_inf", False))

    def zero_inactive(self, layers: Mapping[str, SparseProjection]) -> None:
        for layer in layers.values():
            layer.zero_inactive()

    def reset(self, name: str, layer: SparseProjection, changed: Tensor) -> int:
        zero_state(self.optimizer, layer.weight, changed, name)
        return layer.gathered_bytes


@torch.no_grad()
def zero_state(optimizer: Optimizer, parameter: Tensor, positions: Tensor, name: str) -> None:
    """Set every per-element state of `parameter` to 0 at `positions`.

    Every state tensor of the parameter's shape is per-element state, whatever optimizer it is of. Anything else has no
    entry to reset: step counts, and Adafactor's factored moments, which belong to whole rows and columns of a weight
    or of each tile.

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
