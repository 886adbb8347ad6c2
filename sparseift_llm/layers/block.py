"""`BlockSparseLinear`: a sparse projection that stores and multiplies its active tiles only.

The number of tiles in a block-row never changes, so the parameter has one shape for the whole training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of, whole
from sparseift_llm.layers.stock import is_conv1d, stock_layer_of, stock_matrix
from sparseift_llm.layers.tile_index import TileIndex
from sparseift_llm.ops.block_feed_forward import block_feed_forward_op
from sparseift_llm.ops.block_linear import block_linear_op
from sparseift_llm.ops.dense_gradient import capture_dense_gradient
from sparseift_llm.ops.tiles import dense_weight, tiles_of
from sparseift_llm.topology import blocks


class BlockSparseLinear(TileIndex, SparseProjection):
    """A linear map whose weight is a sum of few (block_size x block_size) tiles.

    Args:
        dense: the `Linear` or `Conv1D` to replace; the active tiles' weights are copied from it.
        columns: block-column of every slot, int32 (N,), distinct within a block-row; slots of row r of
            R are r * N // R to (r + 1) * N // R - 1.
        block_size: b; both sides of the layer are multiples of it.
        dense_shape: (out, in) of the dense twin.

    Attributes:
        weight: (N, b, b), a tile is (out, in).
        is_taken_over: whether another layer computes this one, see `take_over`; forward then returns its input.
        columns: buffer, part of the state dict, because without it the weight has no meaning.

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
        self.is_taken_over = False
        self._before: tuple[BlockSparseLinear, ...] = ()  # a tuple, because it is no child of this layer
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
        """(..., in) -> (..., out); after `take_over`, (..., in of the other layer) -> (..., out)."""
        if self.is_taken_over:
            return input
        if not self._before:
            return self._multiply(input)
        (up,) = self._before
        if isinstance(up.weight, DTensor) and not isinstance(self.weight, DTensor):
            raise ValueError(
                "the two projections of an FFN are computed as one, but were sharded one by one: give fully_shard the "
                "MLP or the block that they are in"
            )
        if self.dense_gradient is None and up.dense_gradient is None:
            return self._feed_forward(up, input)
        # dense gradients need both inputs; kept for one layer at a time, they do not raise the peak of memory
        return checkpoint(self._one_by_one, input, use_reentrant=False, preserve_rng_state=False)

    def take_over(self, up: BlockSparseLinear) -> None:
        """Compute `up` and GELU (tanh formula) in front of this layer, too: the activation between them is large.

        `up` then returns its input, and so must whatever stands between the two.

        Raises:
            ValueError: the layers do not fit together.
        """
        if (up.out_features, up.block_size) != (self.in_features, self.block_size):
            raise ValueError(f"{up} cannot feed {self}")
        up.is_taken_over, self._before = True, (up,)

    def _multiply(self, input: Tensor) -> Tensor:
        _refuse_forward_mode(input, self)
        x, weight, bias = _autocast(input.reshape(-1, self.in_features), self.weight, self.bias)
        y = block_linear_op(x, weight, bias, *self._index, self.out_features)
        if self.dense_gradient is not None and weight.requires_grad:
            y = capture_dense_gradient(y, x, self.dense_gradient)
        return y.view(*input.shape[:-1], self.out_features)

    def hidden(self, input: Tensor) -> Tensor:
        """What this layer multiplies: `input`; after `take_over`, the activation in between, which `forward` hides."""
        return F.gelu(self._before[0]._multiply(input), approximate="tanh") if self._before else input

    def _one_by_one(self, input: Tensor) -> Tensor:
        return self._multiply(self.hidden(input))

    def _feed_forward(self, up: BlockSparseLinear, input: Tensor) -> Tensor:
        _refuse_forward_mode(input, up, self)
        x, up_weight, up_bias = _autocast(input.reshape(-1, up.in_features), up.weight, up.bias)
        _, weight, bias = _autocast(x, self.weight, self.bias)
        y, _ = block_feed_forward_op(
            x, up_weight, up_bias, *up._index, up.out_features, weight, bias, *self._index, self.out_features,
            keep_hidden=x.device.type != "cpu",
        )  # fmt: skip
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
        tiles = f"tiles {size}x{size}" + (", with the layer before it" if self._before else "")
        return f"in_features={self.in_features}, out_features={self.out_features}, {tiles}, {self.describe()}"


class AppliedByNextLayer(nn.Identity):
    """Stands where an activation was that the following `BlockSparseLinear` applies (see `take_over`).

    Args:
        original: the activation, for `to_dense`.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _refuse_forward_mode(input: Tensor, *layers: BlockSparseLinear) -> None:
    """A custom operator would drop the tangents without a word."""
    if torch.compiler.is_compiling():
        return
    for tensor in (input, *(parameter for layer in layers for parameter in (layer.weight, layer.bias))):
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "block-sparse layers have no forward-mode derivatives (torch.func.jvp); differentiate with backward()"
            )


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype where it is on, as for `nn.functional.linear`."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
