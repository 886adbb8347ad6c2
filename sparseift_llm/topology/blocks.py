"""Masks whose units are tiles: which tile each stored slot holds, and drop-and-grow within block-rows.

Legend: R, C = tiles along the output and input side; N = active tiles. A layer stores N tiles; the
slots of block-row r are r * N // R to (r + 1) * N // R - 1, so that rows differ by at most one tile.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from sparseift_llm.topology.masks import random_scores


def row_starts(num_tiles: int, num_rows: int) -> Tensor:
    """First slot of every block-row, and `num_tiles` at the end: int32 (R + 1,).

    >>> row_starts(5, 3).tolist()
    [0, 1, 3, 5]
    """
    return torch.tensor([row * num_tiles // num_rows for row in range(num_rows + 1)], dtype=torch.int32)


def rows_of_slots(num_tiles: int, num_rows: int) -> Tensor:
    """Block-row of every slot, int64 (N,).

    >>> rows_of_slots(5, 3).tolist()
    [0, 1, 1, 2, 2]
    """
    return ((torch.arange(num_tiles) + 1) * num_rows - 1) // max(num_tiles, 1)


def slots_by_column(columns: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """The slots grouped by block-column, for products with the transposed matrix.

    Args:
        columns: block-column of every slot, int32 (N,).
        num_columns: C.

    Returns:
        Slot numbers sorted by column, then slot, int32 (N,); and each column's first place in
        them with N at the end, int32 (C + 1,).
    """
    if columns.is_meta:
        return torch.empty_like(columns), columns.new_empty(num_columns + 1)
    ascending, order = columns.sort(stable=True)
    boundaries = torch.arange(num_columns + 1, dtype=columns.dtype, device=columns.device)
    return order.to(torch.int32), torch.searchsorted(ascending, boundaries, out_int32=True)


def random_columns(num_rows: int, num_columns: int, num_tiles: int, seed: int) -> Tensor:
    """Uniformly random, distinct columns for the slots of every block-row, ascending: int32 (N,)."""
    with torch.device("cpu"):  # also while a model is built on the meta device
        scores = random_scores(torch.Size((num_rows, num_columns)), seed)
        counts = row_starts(num_tiles, num_rows).diff()
        return columns_of(largest_per_row(scores, torch.ones_like(scores, dtype=torch.bool), counts))


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


def changes_per_row(counts: Tensor, fraction: float, phase: float) -> Tensor:
    """How many tiles every block-row exchanges: its share of `fraction`, rounded so that the total comes out.

    With few tiles in a row, rounding each share down would leave 0 in every row and masks that never
    change. Instead running totals are rounded, from a random phase, so that rows take turns.

    Args:
        counts: active tiles per row, int (R,).
        fraction: share to exchange, in [0, 1].
        phase: in [0, 1), another one at each update.

    Returns:
        int64 (R,), each within 1 of `fraction * counts`.

    >>> changes_per_row(torch.tensor([2, 2, 2, 2]), 0.3, 0.0)
    tensor([0, 1, 0, 1])
    """
    exact, start = Fraction(fraction), Fraction(phase)
    totals = [int(exact * total + start) for total in [0, *counts.cumsum(0).tolist()]]
    return torch.tensor(totals).diff()


def drop_and_grow_per_row(mask: Tensor, magnitude: Tensor, growth: Tensor, num_changed: Tensor) -> Tensor:
    """In every block-row, drop the active tiles of smallest magnitude, then grow as many of largest `growth`.

    A tile just dropped competes for growth, so it may come back.

    Args:
        mask: current tile mask, bool (R, C).
        magnitude: score of active tiles, (R, C).
        growth: score of inactive tiles, (R, C), finite.
        num_changed: tiles to drop and to grow per row, int (R,); cut to what the row holds. It may be more than the
            row lacks, because dropped tiles can be grown again.

    Returns:
        New mask with as many tiles in every row as `mask`.

    Source: RigL, arXiv 1911.11134, algorithm 1, on tiles and with constant fan-in per block-row.
    """
    num_changed = num_changed.to(mask.device).minimum(mask.sum(1))
    kept = mask & ~largest_per_row(-magnitude, mask, num_changed)
    return kept | largest_per_row(growth, ~kept, num_changed)


def largest_per_row(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[r]` eligible entries of row r with the largest scores; among equals the lower index wins."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, (~eligible).gather(1, order).sort(dim=1, stable=True).indices)  # eligible ones first
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    chosen = ranks < counts.to(scores.device)[:, None]
    return torch.zeros_like(eligible).scatter(1, order, chosen)
