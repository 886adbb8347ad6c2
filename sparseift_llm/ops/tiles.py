"""From the stored tiles of a block-sparse weight to the dense matrix they stand for, and back.

Legend: b is the side of a tile and N the number of stored tiles ("slots"). The block-row of a slot follows from its
number (see topology/blocks.py); its block-column is in `columns`.
"""

from __future__ import annotations

from torch import Tensor

from sparseift_llm.topology.blocks import rows_of_slots


def dense_weight(weight: Tensor, columns: Tensor, out_features: int, in_features: int) -> Tensor:
    """The dense matrix with its zeros filled in.

    Args:
        weight: the stored tiles (N, b, b), each (out, in).
        columns: the block-column of every tile, int32 (N,).
        out_features: rows of the matrix, a multiple of b.
        in_features: columns of the matrix, a multiple of b.

    Returns:
        (out_features, in_features), in the dtype of `weight`.
    """
    size = weight.shape[1]
    rows, width = out_features // size, in_features // size
    tiles = weight.new_zeros(rows, width, size, size)
    tiles[rows_of_slots(len(columns), rows).to(columns.device), columns.long()] = weight
    return tiles.transpose(1, 2).reshape(out_features, in_features)


def tiles_of(matrix: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """The tiles (N, b, b) that are stored of an (out, in) matrix whose sides are multiples of `block_size`."""
    rows = len(matrix) // block_size
    tiles = matrix.view(rows, block_size, -1, block_size).transpose(1, 2)
    return tiles[rows_of_slots(len(columns), rows).to(columns.device), columns.long()]
