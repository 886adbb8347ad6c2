"""The functions between the two products of a feed-forward block, and their gradients, as every kernel names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseift_llm.utils.words import check_choice


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes:
        value: f.
        backward: (gradient of f(h), h) -> gradient of h.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _relu_squared(h: Tensor) -> Tensor:
    return F.relu(h).square()


def _relu_backward(grad: Tensor, h: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, h, 0)


def _relu_squared_backward(grad: Tensor, h: Tensor) -> Tensor:
    return grad * (2 * F.relu(h))


ACTIVATIONS = {
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
    "gelu_erf": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "relu": Activation(F.relu, _relu_backward),
    "relu_squared": Activation(_relu_squared, _relu_squared_backward),
}


def activation_named(name: str) -> Activation:
    """Raises ValueError for a name that is not in `ACTIVATIONS`."""
    check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
