"""Unstructured sparse projections: a dense weight with zeros, and its mask.

They keep the parameters, names and arithmetic of the layers they replace. Who sets the mask, and
when, is not known here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseift_llm.ops.masked_weight import DenseGradient, masked_weight


class MaskedProjection(nn.Module):
    """What `MaskedLinear` and `MaskedConv1D` share: the mask and the capture of dense gradients.

    Attributes:
        weight: parameter; 0 wherever `mask` is.
        mask: bool buffer of the weight's shape, not part of the state dict (see mask_file.py).
        dense_shape: (out, in) of the dense projection this one replaces.
        num_active: active weights the plan gives this layer, the end point of gradual pruning.
        dense_gradient: where the next backward passes add their unmasked weight gradient, or None.
    """

    weight: Tensor
    bias: Any
    mask: Tensor
    dense_shape: tuple[int, int]
    num_active: int
    dense_gradient: DenseGradient | None

    def _adopt(self, dense: nn.Module, num_active: int, dense_shape: tuple[int, int]) -> None:
        self.weight = dense.weight  # type: ignore[assignment]
        self.bias = dense.bias
        self.dense_shape = dense_shape
        self.num_active = num_active
        self.dense_gradient = None
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool), persistent=False)
        self.train(dense.training)

    def _weight(self) -> Tensor:
        return masked_weight(self.weight, self.mask, self.dense_gradient)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over `mask` (bool, the weight's shape) in place and set inactive weights to exactly 0."""
        self.mask.copy_(mask)
        self.zero_inactive()

    @torch.no_grad()
    def zero_inactive(self) -> None:
        """Set inactive weights to exactly 0."""
        self.weight.masked_fill_(~self.mask, 0)

    def to_dense(self) -> nn.Module:
        """The stock layer with this one's weight and bias (shared, not copied)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        active = self.num_active if self.mask.is_meta else int(self.mask.sum())
        size = self.mask.numel()
        rows, columns = self.dense_shape
        return f"sparsity={1 - active / size:.4f}, active {active:,} of {size:,}, replaces {columns}->{rows}"


class MaskedLinear(MaskedProjection, nn.Linear):
    """`nn.Linear` with a sparse weight (out, in).

    Args:
        dense: the layer to replace; its parameters are taken over, not copied.
        num_active: active weights according to the plan.
        dense_shape: (out, in) of the dense twin.
    """

    def __init__(self, dense: nn.Linear, num_active: int, dense_shape: tuple[int, int]) -> None:
        nn.Linear.__init__(self, dense.in_features, dense.out_features, bias=False, device="meta")
        self._adopt(dense, num_active, dense_shape)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {MaskedProjection.extra_repr(self)}"

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(input, self._weight(), self.bias)

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight, dense.bias = self.weight, self.bias
        return dense.train(self.training)


class MaskedConv1D(MaskedProjection, Conv1D):  # type: ignore[misc]
    """GPT-2's `Conv1D` with a sparse weight, stored (in, out) as there. Arguments as `MaskedLinear`."""

    def __init__(self, dense: Conv1D, num_active: int, dense_shape: tuple[int, int]) -> None:
        with torch.device("meta"):
            Conv1D.__init__(self, dense.nf, dense.nx)
        self._adopt(dense, num_active, dense_shape)

    def __repr__(self) -> str:
        return f"MaskedConv1D(nf={self.nf}, nx={self.nx}, {self.extra_repr()})"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), by the same operation as `Conv1D`."""
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self._weight())
        return flat.view(*x.shape[:-1], self.nf)

    def to_dense(self) -> Conv1D:
        with torch.device("meta"):
            dense = Conv1D(self.nf, self.nx)
        dense.weight, dense.bias = self.weight, self.bias  # type: ignore[assignment]
        return dense.train(self.training)


def masked_projection(dense: nn.Module, num_active: int, dense_shape: tuple[int, int]) -> MaskedProjection:
    """The masked twin of a `Linear` or `Conv1D`; it starts with every weight active."""
    if isinstance(dense, Conv1D):
        return MaskedConv1D(dense, num_active, dense_shape)
    assert isinstance(dense, nn.Linear)
    return MaskedLinear(dense, num_active, dense_shape)


def sparse_layers(model: nn.Module) -> dict[str, MaskedProjection]:
    """All sparse projections of a model by module path, in the model's own order.

    Prefixes that wrappers add (DistributedDataParallel, torch.compile) are taken off.
    """
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): module
        for name, module in model.named_modules()
        if isinstance(module, MaskedProjection)
    }
