"""`TiledProjection`: what all sparse layers have in common that store the active tiles of their matrix, and no others.

The number of tiles in a block-row never changes, so the parameter has one shape for the whole training. What is
multiplied or looked up with the tiles is in block.py and block_embedding.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_llm.layers.base import SparseProjection
from sparseift_llm.layers.sharding import local, part_of, whole
from sparseift_llm.layers.tile_index import TileIndex
from sparseift_llm.ops.tiles import dense_weight, tiles_of
from sparseift_llm.topology import blocks
from sparseift_llm.topology.groups import EqualGroups


class TiledProjection(TileIndex, SparseProjection):
    """A sparse matrix that is a sum of few (block_size x block_size) tiles; the units of its masks are tiles.

    Attributes:
        weight: the tiles (N, b, b), each (out, in). The tiles of block-row r of R are those from r * N // R to
            (r + 1) * N // R - 1.
    """

    def _store(
        self, matrix: Tensor, columns: Tensor, block_size: int, dense_shape: tuple[int, int], requires_grad: bool
    ) -> None:
        """Make the parameter and the buffers; once, after `out_features` and `in_features` are set.

        Args:
            matrix: (out, in), of which the active tiles are copied. Its sides are multiples of `block_size`.
            columns: the block-column of every tile, int32 (N,), distinct within a block-row.
            block_size: b.
            dense_shape: (out, in) of the dense twin.
            requires_grad: whether the tiles are trained.

        Raises:
            ValueError: `columns` are not valid.
        """
        self.block_size = block_size
        self.dense_shape = dense_shape
        self.num_active = len(columns) * block_size**2
        self.dense_gradient = None
        self._register_columns(columns.to(matrix.device))
        tiles = tiles_of(matrix, self.columns, block_size)
        self.weight = nn.Parameter(tiles.clone(memory_format=torch.contiguous_format), requires_grad)

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

    def accepts(self, mask: Tensor) -> bool:
        counts = self.groups.share(len(self.columns))
        return mask.shape == self.mask_shape and torch.equal(mask.sum(1).cpu(), counts)

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
        return self.num_rows * self.block_size, self.num_columns * self.block_size

    def zero_inactive(self) -> None:
        """Nothing to do: inactive weights are not stored."""

    @torch.no_grad()
    def unit_sums(self, values: Tensor) -> Tensor:
        sums = whole(values.sum((1, 2), dtype=_sum_dtype(values)))
        scores = sums.new_zeros(self.num_rows, self.num_columns)
        rows = blocks.rows_of_slots(len(self.columns), self.num_rows).to(self.columns.device)
        scores[rows, self.columns.long()] = sums
        return scores

    def growth_scores(self, dense_gradient: Tensor) -> Tensor:
        return blocks.tile_sums(dense_gradient, self.block_size)

    @property
    def lines(self) -> tuple[int, ...]:
        """Columns alone: block-rows keep their numbers of tiles, which are above 0."""
        return (0,)

    @property
    def groups(self) -> EqualGroups:
        """Block-rows: the number of tiles in each is fixed."""
        return EqualGroups(0, self.num_rows)

    def dense_matrix(self) -> Tensor:
        """The matrix (R * b, C * b) with its zeros filled in, without gradient."""
        rows, columns = self.gradient_shape
        return dense_weight(self.weight.detach(), self.columns, rows, columns)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
