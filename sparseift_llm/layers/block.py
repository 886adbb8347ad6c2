"""`BlockSparseLinear`: a sparse projection that stores and multiplies its active tiles only.

The number of tiles in a block-row never changes, so the parameter has one shape for the whole training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of, whole
from sparseift_llm.layers.stock import is_conv1d, stock_layer_of, stock_matrix
from sparseift_llm.layers.tile_index import TileIndex
from sparseift_llm.ops.block_linear import block_linear_op
from sparseift_llm.ops.dense_gradient import capture_dense_gradient
from sparseift_llm.ops.operands import autocast_operands, call_operator, refuse_forward_mode
from sparseift_llm.ops.tiles import dense_weight, tiles_of
from sparseift_llm.topology import blocks


class BlockSparseLinear(TileIndex, SparseProjection):
    """A linear map whose weight is a sum of few (block_size x block_size) tiles.

    Args:
        dense: the `Linear` or `Conv1D` to replace. The weights of the active tiles are copied from it.
        columns: the block-column of every tile, int32 (N,), distinct within a block-row. The tiles of block-row r
            of R are those from r * N // R to (r + 1) * N // R - 1.
        block_size: b; both sides of the layer are multiples of it.
        dense_shape: (out, in) of the dense twin.

    Attributes:
        weight: the tiles (N, b, b), each (out, in).
        is_conv1d: whether the replaced layer is a `Conv1D`, so that `to_dense` makes one again.

    Raises:
        ValueError: a side is not a multiple of `block_size`, or `columns` are not valid.
    """

    def __init__(self, dense: nn.Module, columns: Tensor, block_size: int, dense_shape: tuple[int, int]) -> None:
        super().__init__()
        matrix = stock_matrix(dense)
        self.out_features, self.in_features = int(matrix.shape[0]), int(matrix.shape[1])
        self.block_size = block_size
        self.is_conv1d = is_conv1d(dense)
        for side in matrix.shape:
            if side % block_size:
                raise ValueError(f"a side of {side} is not a multiple of block_size={block_size}; choose another one")
        self.dense_shape = dense_shape
        self.num_active = len(columns) * block_size**2
        self.dense_gradient = None
        self._register_columns(columns.to(matrix.device))
        tiles = tiles_of(matrix, self.columns, block_size)
        requires_grad = bool(dense.weight.requires_grad)
        self.weight = nn.Parameter(tiles.clone(memory_format=torch.contiguous_format), requires_grad)
        self.bias = dense.bias
        self.train(dense.training)

    @property
    def mask_shape(self) -> torch.Size:
        return torch.Size((self.num_rows, self.num_columns))

    def current_mask(self) -> Tensor:
        """Which tiles are active: bool (R, C), made from the columns at each call."""
        return blocks.tile_mask(self.columns, self.num_rows, self.num_columns)

    def count_active(self) -> int:
        """The number of stored weights: every slot holds a tile."""
        return self.num_active

    @property
    def unit_size(self) -> int:
        return self.block_size**2

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        refuse_forward_mode(input, self.weight, self.bias)
        x, weight, bias = autocast_operands(input.reshape(-1, self.in_features), self.weight, self.bias)
        y: Tensor = call_operator(block_linear_op, x, weight, bias, *self.index, self.out_features)
        if self.dense_gradient is not None and weight.requires_grad:
            y = capture_dense_gradient(y, x, self.dense_gradient)
        return y.view(*input.shape[:-1], self.out_features)

    def accepts(self, mask: Tensor) -> bool:
        counts = blocks.row_starts(len(self.columns), self.num_rows).diff()
        return mask.shape == self.mask_shape and torch.equal(mask.sum(1).cpu(), counts.long())

    def weights_fit(self, mask: Tensor) -> bool:
        return torch.equal(self.current_mask(), mask.to(self.columns.device))

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> Tensor:
        """As for every sparse layer: slots of dropped tiles go to the grown tiles of the same block-row.

        Raises:
            ValueError: another number of tiles in some block-row than now.
        """
        if not self.accepts(mask):
            raise ValueError("the number of tiles in a block-row is fixed; the mask has another one, or another shape")
        columns, changed = blocks.reassign(self.columns, self.current_mask(), mask.to(self.columns.device))
        self.set_columns(columns)
        changed = changed[:, None, None]
        local(self.weight).masked_fill_(part_of(changed, self.weight), 0)
        return changed

    @property
    def topology(self) -> Tensor:
        return self.columns

    def load_topology(self, topology: Tensor) -> None:
        self.set_columns(topology)

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def zero_inactive(self) -> None:
        """Nothing to do: inactive weights are not stored."""

    @torch.no_grad()
    def magnitude(self) -> Tensor:
        sums = whole(self.weight.abs().sum((1, 2), dtype=_sum_dtype(self.weight)))
        scores = sums.new_zeros(self.num_rows, self.num_columns)
        rows = blocks.rows_of_slots(len(self.columns), self.num_rows).to(self.columns.device)
        scores[rows, self.columns.long()] = sums
        return scores

    def growth_scores(self, dense_gradient: Tensor) -> Tensor:
        return blocks.tile_sums(dense_gradient, self.block_size)

    def exchange(self, fraction: float, growth: Tensor, phase: float) -> Tensor:
        mask = self.current_mask()
        num_changed = blocks.changes_per_row(mask.sum(1), fraction, phase)
        return blocks.drop_and_grow_per_row(mask, self.magnitude(), growth, num_changed)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        matrix = dense_weight(self.weight.detach(), self.columns, self.out_features, self.in_features)
        return stock_layer_of(
            matrix, self.bias, as_conv1d=self.is_conv1d, requires_grad=self.weight.requires_grad, training=self.training
        )

    def extra_repr(self) -> str:
        size = self.block_size
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, tiles {size}x{size}, {self.describe()}"


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
