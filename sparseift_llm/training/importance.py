"""How important each active unit is, which decides what a mask update drops: by magnitude, or by saliency.

For a tile the scores of its weights are added up. All tiles of a matrix have one size, so that this orders them as the
mean would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseift_llm.config.dst import DSTConfig
from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.training.backends.base import OptimizerBackend
from sparseift_llm.training.backends.torch import TorchBackend

_MOMENT = "exp_avg_sq"  # of torch's Adam, and of what is modelled on it


def magnitude(layer: SparseProjection) -> Tensor:
    """|w|, the rule of the reference: of the mask's shape."""
    return layer.magnitude()


class Saliency:
    """|w| times the root mean square of its gradient, as Adam's second moment has accumulated it over steps.

    To first order |w * gradient| is what the loss changes by if the weight is dropped. Nothing is stored for it, and it
    is saved and sharded with the optimizer's state.

    Args:
        optimizer: an optimizer with a second moment for every weight.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def __call__(self, layer: SparseProjection) -> Tensor:
        moment = self.optimizer.state.get(layer.weight, {}).get(_MOMENT)
        if moment is None:  # no step has reached the layer, so that no weight has a gradient
            return torch.zeros_like(layer.magnitude())
        if moment.shape != layer.weight.shape:
            raise ValueError(
                f"drop_by='saliency' needs a second moment of every weight, and {type(self.optimizer).__name__} keeps "
                f"one of shape {tuple(moment.shape)} for a weight of {tuple(layer.weight.shape)}; use AdamW, or "
                "drop_by='magnitude'"
            )
        return layer.unit_sums(layer.weight.detach().abs() * moment.sqrt())


def rule_for(dst: DSTConfig, backend: OptimizerBackend) -> Callable[[SparseProjection], Tensor]:
    """The score by which the updates of a run drop.

    Raises:
        ValueError: the transformation asks for saliency, and the optimizer has no second moments that can be read.
    """
    if dst.drop_by == "magnitude":
        return magnitude
    optimizer = backend.optimizer
    has_betas = all(len(group.get("betas", ())) == 2 for group in optimizer.param_groups)
    if not (isinstance(backend, TorchBackend) and backend.is_alone and has_betas):
        raise ValueError(
            f"drop_by='saliency' reads the second moments of an Adam, and the optimizer is {type(optimizer).__name__}, "
            "perhaps inside another one or under DeepSpeed; use AdamW, or drop_by='magnitude'"
        )
    return Saliency(optimizer)
