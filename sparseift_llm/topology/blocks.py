"""Masks whose units are tiles: which tile each stored slot holds, at first and after mask updates.

Legend: R, C = tiles along the output and input side; N = active tiles. A layer stores N tiles; the
slots of block-row r are r * N // R to (r + 1) * N // R - 1, so that rows differ by at most one tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparseift_llm._moved import old_names
from sparseift_llm.topology.connected import reconnect
from sparseift_llm.topology.groups import EqualGroups
from sparseift_llm.topology.masks import random_scores

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)


def rows_of_slots(num_tiles: int, num_rows: int) -> Tensor:
    """Block-row of every slot, int64 (N,).

    >>> rows_of_slots(5, 3).tolist()
    [0, 1, 1, 2, 2]
    """
    return ((torch.arange(num_tiles) + 1) * num_rows - 1) // max(num_tiles, 1)


class ByColumn(NamedTuple):
    """The slots grouped by block-column, for products with the transposed matrix; int32 tables.

    Attributes:
        slots: slot numbers sorted by column, then slot (N,).
        rows: the block-row of each of them (N,).
        starts: each column's first place in the two, and N at the end (C + 1,).
        heavy_first: the columns by their number of tiles, the most first, among equals the lower first (C,). Work that
            is handed out in this order ends at about the same time everywhere.
    """

    slots: Tensor
    rows: Tensor
    starts: Tensor
    heavy_first: Tensor


def by_column(columns: Tensor, num_rows: int, num_columns: int) -> ByColumn:
    """Group the slots by their block-columns, int32 (N,), in a matrix of (num_rows, num_columns) tiles."""
    slots, starts = slots_by_column(columns, num_columns)
    if columns.is_meta:
        return ByColumn(slots, torch.empty_like(slots), starts, starts.new_empty(num_columns))
    rows = rows_of_slots(len(columns), num_rows).to(columns.device)[slots.long()]
    heavy_first = starts.diff().sort(descending=True, stable=True).indices
    return ByColumn(slots, rows.to(torch.int32), starts, heavy_first.to(torch.int32))


def slots_by_column(columns: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """`ByColumn.slots` and `ByColumn.starts` of the block-columns of all slots, int32 (N,)."""
    if columns.is_meta:
        return torch.empty_like(columns), columns.new_empty(num_columns + 1)
    ascending, order = columns.sort(stable=True)
    boundaries = torch.arange(num_columns + 1, dtype=columns.dtype, device=columns.device)
    return order.to(torch.int32), torch.searchsorted(ascending, boundaries, out_int32=True)


def random_columns(num_rows: int, num_columns: int, num_tiles: int, seed: int, connected: bool = False) -> Tensor:
    """Uniformly random, distinct columns for the slots of every block-row, ascending: int32 (N,).

    With `connected` no block-column stays without a tile, where the numbers allow it.
    """
    with torch.device("cpu"):  # also while a model is built on the meta device
        shape, groups = torch.Size((num_rows, num_columns)), EqualGroups(0, num_rows)
        mask = groups.first_mask(shape, num_tiles, seed)
        if connected:
            mask = reconnect(mask, random_scores(shape, seed), groups, dims=(0,))
        return columns_of(mask)


def columns_of(mask: Tensor) -> Tensor:
    """The active columns of a tile mask (R, C), row by row, ascending: int32 (N,)."""
    return mask.nonzero()[:, 1].to(torch.int32)


def tile_mask(columns: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Bool mask (R, C) of the tiles that the slots hold."""
    mask = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=columns.device)
    mask[rows_of_slots(len(columns), num_rows).to(columns.device), columns.long()] = True
    return mask


def are_valid(columns: Tensor, num_rows: int, num_columns: int) -> bool:
    """Whether all columns (N,) are inside a matrix of (R, C) tiles, and distinct within a block-row."""
    inside = bool(((columns >= 0) & (columns < num_columns)).all())
    return inside and int(tile_mask(columns, num_rows, num_columns).sum()) == len(columns)


def reassign(columns: Tensor, mask: Tensor, new_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give the slots of dropped tiles to the grown tiles of the same block-row, both in ascending order.

    Args:
        columns: int32 (N,), what the slots hold now.
        mask: the tile mask (R, C) of `columns`.
        new_mask: (R, C), with as many tiles in every row as `mask`.

    Returns:
        The new columns (N,), and a bool (N,) that is true for reassigned slots.
    """
    rows = rows_of_slots(len(columns), len(mask)).to(columns.device)
    changed = ~new_mask[rows, columns.long()]
    result = columns.clone()
    result[changed] = columns_of(new_mask & ~mask)
    return result, changed


def tile_sums(matrix: Tensor, block_size: int) -> Tensor:
    """Sum of absolute values (L1 norm) of every tile of an (out, in) matrix: (R, C)."""
    rows, columns = matrix.shape[0] // block_size, matrix.shape[1] // block_size
    return matrix.abs().view(rows, block_size, columns, block_size).sum((1, 3))
