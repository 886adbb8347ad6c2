"""Unstructured sparse projections: a dense weight with zeros, and its mask.

They keep the parameters, their names and the arithmetic of the layers that they replace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of, whole
from sparseift_llm.layers.stock import is_conv1d, stock_layer
from sparseift_llm.ops.masked_weight import masked_weight
from sparseift_llm.ops.semi_structured import semi_structured_linear
from sparseift_llm.record.specs import MatrixSpec
from sparseift_llm.topology.groups import EqualGroups, Groups, InputGroups, RowSets, WholeMatrix
from sparseift_llm.topology.transposable import TransposableBlocks


class MaskedProjection(SparseProjection):
    """What `MaskedLinear` and `MaskedConv1D` share.

    Attributes:
        weight: the dense parameter, exactly 0 wherever the mask is.
        mask: bool buffer of the weight's shape. It is not in the state dict (see checkpoints/mask_file.py).
        pattern: (n, m) if of every m neighbouring inputs n are active, else None.
        transposable: whether of every m neighbouring outputs n are active, too.
        uses_semi_structured_kernels: whether outputs, and of transposable masks the gradients of inputs, are computed
            on torch's kernels for 2:4 matrices.
    """

    mask: Tensor
    pattern: tuple[int, int] | None = None
    transposable: bool = False
    uses_semi_structured_kernels: bool = False
    _groups: Groups = WholeMatrix()

    def divide(self, matrix: MatrixSpec) -> None:
        """Let each of the groups that `matrix` names keep its number of active weights from now on.

        Groups are those of an n:m mask, or its blocks, or row groups, heads, or both.
        """
        self.pattern, self.transposable = matrix.pattern, matrix.transposable
        if self.pattern is not None:
            n, m = self.pattern
            along_inputs = InputGroups(self.output_dim, matrix.num_weights // m)
            self._groups = TransposableBlocks(n, m) if self.transposable else along_inputs
            return
        side = 0 if matrix.heads is None else matrix.heads[0]
        dim = side ^ self.output_dim
        if matrix.row_groups:
            self._groups = RowSets(dim, matrix.row_groups, None if matrix.heads is None else matrix.head_size)
        elif matrix.heads is not None:
            self._groups = EqualGroups(dim, matrix.heads[1])

    def divide_rows(self) -> None:
        """Let every row of the weight keep its number of active weights from now on, as those of words do."""
        self._groups = EqualGroups(0, self.mask.shape[0])

    def _adopt(self, dense: nn.Module, num_active: int, dense_shape: tuple[int, int]) -> None:
        self.weight = dense.weight  # type: ignore[assignment]
        self.bias = getattr(dense, "bias", None)  # an embedding has none
        self.dense_shape = dense_shape
        self.num_active = num_active
        self.dense_gradient = None
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool), persistent=False)
        self.train(dense.training)

    def _masked_weight(self) -> Tensor:
        return masked_weight(self.weight, self.mask, self.dense_gradient)

    @property
    def unit_size(self) -> int:
        return 1

    @property
    def mask_shape(self) -> torch.Size:
        return self.mask.shape

    def current_mask(self) -> Tensor:
        return self.mask

    def count_active(self) -> int:
        return int(self.mask.sum())

    def accepts(self, mask: Tensor) -> bool:
        if not super().accepts(mask) or self.pattern is None:
            return super().accepts(mask)
        n, m = self.pattern
        sides = (0, 1) if self.transposable else (self.output_dim,)
        return all(bool((InputGroups(dim, mask.numel() // m).count(mask) == n).all()) for dim in sides)

    @torch.no_grad()
    def weights_fit(self, mask: Tensor) -> bool:
        return not has_surplus(whole(self.weight), mask.to(self.mask.device))

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> Tensor:
        changed = mask != self.mask
        self.mask.copy_(mask)
        self.zero_inactive()
        return changed

    @property
    def lines(self) -> tuple[int, ...]:
        return () if self.transposable else (0, 1)  # a pattern leaves no row and no column empty

    @property
    def output_dim(self) -> int:
        return 1 if is_conv1d(self) else 0

    @property
    def groups(self) -> Groups:
        return self._groups

    @property
    def topology(self) -> Tensor:
        return self.mask

    def load_topology(self, topology: Tensor) -> None:
        self.mask.copy_(topology)

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @torch.no_grad()
    def zero_inactive(self) -> None:
        local(self.weight).masked_fill_(~part_of(self.mask, self.weight), 0)

    def restore_buffers(self) -> None:
        self.mask.fill_(True)

    def unit_sums(self, values: Tensor) -> Tensor:
        return whole(values)

    def growth_scores(self, dense_gradient: Tensor) -> Tensor:
        return dense_gradient.abs()

    def to_dense(self) -> nn.Module:
        """The stock layer around the same parameters."""
        return stock_layer(self.weight, self.bias, as_conv1d=is_conv1d(self), training=self.training)  # type: ignore[arg-type]


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
        return f"{nn.Linear.extra_repr(self)}, {self.describe()}"

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.uses_semi_structured_kernels:
            return semi_structured_linear(input, self._masked_weight(), self.bias, self.transposable)
        return F.linear(input, self._masked_weight(), self.bias)


class MaskedConv1D(MaskedProjection, Conv1D):  # type: ignore[misc]
    """GPT-2's `Conv1D` with a sparse weight, which it stores as (in, out). Arguments as `MaskedLinear`."""

    def __init__(self, dense: Conv1D, num_active: int, dense_shape: tuple[int, int]) -> None:
        with torch.device("meta"):
            Conv1D.__init__(self, dense.nf, dense.nx)
        self._adopt(dense, num_active, dense_shape)

    def __repr__(self) -> str:
        return f"MaskedConv1D(nf={self.nf}, nx={self.nx}, {self.describe()})"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), by the same operation as `Conv1D`, unless on kernels for 2:4 matrices."""
        if self.uses_semi_structured_kernels:
            return semi_structured_linear(x, self._masked_weight().T, self.bias, self.transposable)
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self._masked_weight())
        return flat.view(*x.shape[:-1], self.nf)


def masked_projection(dense: nn.Module, num_active: int, dense_shape: tuple[int, int]) -> MaskedProjection:
    """The masked twin of a `Linear` or `Conv1D`. It starts with every weight active."""
    if isinstance(dense, Conv1D):
        return MaskedConv1D(dense, num_active, dense_shape)
    assert isinstance(dense, nn.Linear)
    return MaskedLinear(dense, num_active, dense_shape)


def has_surplus(weight: Tensor, mask: Tensor) -> bool:
    """Whether a weight differs from 0 anywhere where its mask is 0; both have one shape."""
    return bool(((weight != 0) & ~mask).any())
