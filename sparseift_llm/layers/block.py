"""`BlockSparseLinear`: a sparse projection that stores and multiplies its active tiles only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_llm.layers.stock import is_conv1d, stock_layer_of, stock_matrix
from sparseift_llm.layers.tiled import TiledProjection
from sparseift_llm.ops.block_linear import block_linear
from sparseift_llm.ops.dense_gradient import capture_dense_gradient
from sparseift_llm.ops.operands import autocast_operands, call_operator, refuse_forward_mode


class BlockSparseLinear(TiledProjection):
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
        self.is_conv1d = is_conv1d(dense)
        for side in matrix.shape:
            if side % block_size:
                raise ValueError(f"a side of {side} is not a multiple of block_size={block_size}; choose another one")
        self._store(matrix, columns, block_size, dense_shape, bool(dense.weight.requires_grad))
        self.bias = dense.bias
        self.train(dense.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        refuse_forward_mode(input, self.weight, self.bias)
        x, weight, bias = autocast_operands(input.reshape(-1, self.in_features), self.weight, self.bias)
        y: Tensor = call_operator(block_linear, x, weight, bias, *self.index, self.out_features)
        if self.dense_gradient is not None and weight.requires_grad:
            y = capture_dense_gradient(y, x, self.dense_gradient)
        return y.view(*input.shape[:-1], self.out_features)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        matrix, requires_grad = self.dense_matrix(), self.weight.requires_grad
        return stock_layer_of(
            matrix, self.bias, as_conv1d=self.is_conv1d, requires_grad=requires_grad, training=self.training
        )

    def extra_repr(self) -> str:
        size = self.block_size
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, tiles {size}x{size}, {self.describe()}"
