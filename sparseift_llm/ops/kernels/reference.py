"""Block-sparse products the plain way, by filling in the zeros: what the other kernels are tested against.

All kernel modules have these three functions. Legend: T tokens, b block size, R x C tiles of which N are
stored; a slot's block-row follows from its number (topology/blocks.py), its block-column is in `columns`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseift_llm.topology.blocks import rows_of_slots


def dense_weight(weight: Tensor, columns: Tensor, out_features: int, in_features: int) -> Tensor:
    """The (out, in) matrix with its zeros, from tiles (N, b, b) and their columns (N,)."""
    size = weight.shape[1]
    rows, width = out_features // size, in_features // size
    tiles = weight.new_zeros(rows, width, size, size)
    tiles[rows_of_slots(len(columns), rows).to(columns.device), columns.long()] = weight
    return tiles.transpose(1, 2).reshape(out_features, in_features)


def tiles_of(matrix: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """The stored tiles (N, b, b) of an (out, in) matrix."""
    rows = len(matrix) // block_size
    tiles = matrix.view(rows, block_size, -1, block_size).transpose(1, 2)
    return tiles[rows_of_slots(len(columns), rows).to(columns.device), columns.long()]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, out_features: int) -> Tensor:
    """x (T, in) times the transposed weight, plus bias (out,): (T, out)."""
    return torch.nn.functional.linear(x, dense_weight(weight, columns, out_features, x.shape[1]), bias)


def input_gradient(
    grad: Tensor, weight: Tensor, slots_by_column: Tensor, column_starts: Tensor, out_features: int, in_features: int
) -> Tensor:
    """grad (T, out) times the weight: (T, in). The indices are those of `topology.blocks.slots_by_column`."""
    columns = torch.empty_like(slots_by_column)
    places = torch.arange(len(columns), dtype=column_starts.dtype, device=columns.device)
    columns[slots_by_column.long()] = (torch.searchsorted(column_starts, places, right=True) - 1).to(columns.dtype)
    return grad @ dense_weight(weight, columns, out_features, in_features)


def weight_gradient(grad: Tensor, x: Tensor, columns: Tensor, block_size: int) -> Tensor:
    """grad (T, out) transposed times x (T, in), the stored tiles of it: (N, b, b)."""
    return tiles_of(grad.T @ x, columns, block_size).contiguous()
