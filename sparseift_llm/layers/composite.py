"""What drop-in families build: a module of several matrices in place of one projection, with its sides and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseift_llm.layers.base import SparseProjection


@dataclass(frozen=True)
class Part:
    """One matrix inside a composite projection.

    Args:
        name: path inside the module, e.g. `branches.0`.
        shape: (out, in).
        num_active: weights that are multiplied.
        is_sparse: whether it gets a mask; a dense part has all its weights active.
    """

    name: str
    shape: tuple[int, int]
    num_active: int
    is_sparse: bool = True

    @property
    def num_weights(self) -> int:
        """Zeros included."""
        return self.shape[0] * self.shape[1]


MakePart = Callable[[Part, float], nn.Module]  # a part, and the standard deviation of its weights -> its layer


class CompositeProjection(nn.Module):
    """A projection made of several matrices.

    Args:
        dense: the `Linear` or `Conv1D` to replace; its bias is taken over, added last.

    Attributes:
        in_features, out_features: sides, as the dense projection's.
    """

    bias: Any

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.is_conv1d = isinstance(dense, Conv1D)
        weight: Any = dense.weight
        self.out_features, self.in_features = weight.T.shape if self.is_conv1d else weight.shape
        self.bias = dense.bias
        self.register_load_state_dict_pre_hook(_drop_stock_weight)
        self.train(dense.training)

    def matrix(self) -> Tensor:
        """The one (out, in) matrix that computes the same.

        Raises:
            ValueError: there is none, because of a non-linearity.
        """
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The stock layer that computes the same; raises ValueError as `matrix` does."""
        weight = self.matrix()
        stock: nn.Module
        with torch.device("meta"):
            if self.is_conv1d:
                stock = Conv1D(self.out_features, self.in_features)
            else:
                stock = nn.Linear(self.in_features, self.out_features, bias=False)
        takes_gradient = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        stock.weight = nn.Parameter(weight.T.contiguous() if self.is_conv1d else weight, takes_gradient)
        stock.bias = self.bias
        return stock.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def _drop_stock_weight(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Pass over what `stock_weights` adds to checkpoints."""
    state.pop(prefix + "weight", None)


def stock_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds in place of the weights that composite projections replace, by name.

    One zero each: a stock class finds a weight of another shape, and raises an error instead of drawing a random one.
    """
    composites = [name for name, module in model.named_modules() if isinstance(module, CompositeProjection)]
    return {f"{name}.weight": torch.zeros(1) for name in composites}


def matrix_of(layer: nn.Module) -> Tensor:
    """The (out, in) weight of a part, zeros filled in."""
    dense = layer.to_dense() if isinstance(layer, SparseProjection) else layer
    weight: Any = dense.weight
    return torch.as_tensor(weight).detach()


def root_mean_square(dense: nn.Module) -> float:
    """Of a projection's weights; 0.02, GPT-2's, where they have no values."""
    weight: Any = dense.weight
    return 0.02 if weight.is_meta else float(weight.detach().double().square().mean().sqrt())


def make_parts(parts: tuple[Part, ...], std: Mapping[str, float], make: MakePart) -> dict[str, nn.Module]:
    """The layers of all parts by name; `std` gives each part's standard deviation."""
    return {part.name: make(part, std[part.name]) for part in parts}
