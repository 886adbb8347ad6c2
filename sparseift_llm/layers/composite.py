"""What drop-in families build: a module of several matrices in place of one projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseift_llm.layers.base import SparseProjection, plain_name
from sparseift_llm.layers.stock import is_conv1d, stock_layer_of, stock_matrix


@dataclass(frozen=True)
class Part:
    """One matrix inside a composite projection.

    Args:
        name: path inside the module, e.g. `branches.0`.
        shape: (out, in).
        num_active: weights that are multiplied.
        is_sparse: whether it gets a mask; a dense part has all its weights active.
        makes_outputs: whether its outputs are those of the projection, row by row.
        pattern: (n, m) if of every m neighbouring inputs n are active, else None.
        transposable: whether of every m neighbouring outputs n are active, too.
    """

    name: str
    shape: tuple[int, int]
    num_active: int
    is_sparse: bool = True
    makes_outputs: bool = True
    pattern: tuple[int, int] | None = None
    transposable: bool = False

    @property
    def num_weights(self) -> int:
        """Zeros included."""
        return self.shape[0] * self.shape[1]


MakePart = Callable[[Part, float], nn.Module]  # a part, and the standard deviation of its weights -> its layer


class CompositeProjection(nn.Module):
    """A projection made of several matrices.

    Args:
        dense: the `Linear` or `Conv1D` to replace. Its bias is taken over, and added last.

    Attributes:
        in_features, out_features: the sides of the dense projection.
        is_conv1d: whether the replaced layer is a `Conv1D`, so that `to_dense` makes one again.
    """

    bias: Any

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.is_conv1d = is_conv1d(dense)
        self.out_features, self.in_features = stock_matrix(dense).shape
        self.bias = dense.bias
        self.register_load_state_dict_pre_hook(_drop_stock_weight)
        self.train(dense.training)

    def matrix(self) -> Tensor:
        """The (out, in) matrix that computes the same.

        Raises:
            ValueError: no single matrix does, because of a non-linearity.
        """
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The stock layer that computes the same; raises ValueError as `matrix` does."""
        takes_gradient = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        return stock_layer_of(
            self.matrix(), self.bias, as_conv1d=self.is_conv1d, requires_grad=takes_gradient, training=self.training
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def _drop_stock_weight(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Leave out what `stock_weights` adds to checkpoints."""
    state.pop(prefix + "weight", None)


def stock_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds under the names of the weights that composite projections replace.

    Each is a single zero. A stock class that loads the checkpoint finds a weight of another shape and raises an error,
    where it would draw a random weight if it found none.
    """
    composites = [name for name, module in model.named_modules() if isinstance(module, CompositeProjection)]
    return {f"{plain_name(name)}.weight": torch.zeros(1) for name in composites}


def matrix_of(layer: nn.Module) -> Tensor:
    """The (out, in) weight of a part, zeros filled in."""
    dense = layer.to_dense() if isinstance(layer, SparseProjection) else layer
    weight: Any = dense.weight
    return torch.as_tensor(weight).detach()


def root_mean_square(dense: nn.Module) -> float:
    """The root mean square of a projection's weights; on the meta device, without values, GPT-2's 0.02."""
    weight: Any = dense.weight
    return 0.02 if weight.is_meta else float(weight.detach().double().square().mean().sqrt())


def make_parts(parts: tuple[Part, ...], std: Mapping[str, float], make: MakePart) -> dict[str, nn.Module]:
    """The layers of all parts by name; `std` gives each part's standard deviation."""
    return {part.name: make(part, std[part.name]) for part in parts}
