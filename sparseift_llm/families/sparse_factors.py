"""Two sparse factors of a trained weight that hold its largest entries as they are, and pass numbers on otherwise.

Singular vectors are full, and lose much when few of their entries may stay. Here an inner unit either passes one
input on, so that V holds that input's column of the weight, or U computes part of one output in it, which V passes on.
Rows, columns and entries are counted in tiles, if the factors have tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseift_llm.families.trained_start import Start, counts_per_row, fill_up
from sparseift_llm.layers.composite import Part

_NUM_TRIED = 17


@dataclass(frozen=True)
class _Split:
    """Which inner units do what. Legend: R x C units in the weight, D inner ones.

    Args:
        passed: inputs that an inner unit passes on, bool (C,).
        num_partial: inner units that compute a part of each output, int (R,).
        in_v, in_u: entries of the weight that V, or U, holds; bool (R, C), disjoint.
        energy: sum of squares of these entries.
    """

    passed: Tensor
    num_partial: Tensor
    in_v: Tensor
    in_u: Tensor
    energy: float


def pass_through(weight: Tensor, u: Part, v: Part, tile: int, seed: int) -> tuple[Start, Start] | None:
    """U and V whose product holds as much of `weight` (out, in) as their active units can; other entries are 0.

    Args:
        weight: (out, in).
        u, v: the factors (inner, in) and (out, inner).
        tile: side of a tile, 1 for single weights.
        seed: of the places of active weights that are 0.

    Returns:
        The starts of U and V; None if the active units of V are too few for any.
    """
    tiles = weight.unflatten(1, (-1, tile)).unflatten(0, (-1, tile)).transpose(1, 2)  # (R, C, b, b)
    per_u, per_v = _per_row(u, tile).min(), _per_row(v, tile).to(weight.device)
    num_inner = u.shape[0] // tile
    most = min(num_inner, tiles.shape[1])
    tried = {round(most * index / (_NUM_TRIED - 1)) for index in range(_NUM_TRIED)}
    energy = tiles.square().sum((2, 3))
    order = energy.sort(dim=1, descending=True, stable=True).indices
    splits = [_split(energy, order, number, num_inner, int(per_u), per_v) for number in sorted(tried)]
    best = max((split for split in splits if split), key=lambda split: split.energy, default=None)
    if best is None:
        return None
    inner, outer = _factors(tiles, best, num_inner)
    starts = []
    for part, factor in ((u, inner), (v, outer)):
        mask = fill_up(factor.any(-1).any(-1), part, tile, seed) if part.is_sparse else None
        starts.append(Start(factor.transpose(1, 2).flatten(2, 3).flatten(0, 1), mask))
    return starts[0], starts[1]


def _per_row(part: Part, tile: int) -> Tensor:
    """Active units that every row may have at least."""
    num_rows = part.shape[0] // tile
    if not part.is_sparse:
        return torch.full((num_rows,), part.shape[1] // tile)
    return counts_per_row(part, tile) if tile > 1 else torch.full((num_rows,), part.num_active // num_rows)


def _split(energy: Tensor, order: Tensor, num_passed: int, num_inner: int, per_u: int, per_v: Tensor) -> _Split | None:
    """What fits if `num_passed` inner units pass inputs on, and the others compute parts of outputs.

    Args:
        energy: sum of squares of each entry (R, C).
        order: columns of each row by descending energy (R, C).
        num_passed, num_inner: inner units.
        per_u, per_v: active units in every row of U, and in each of V (R,).
    """
    num_rows, width = energy.shape
    passed = torch.zeros(width, dtype=torch.bool, device=energy.device)
    passed[energy.sum(0).sort(descending=True, stable=True).indices[:num_passed]] = True
    each, rest = divmod(num_inner - num_passed, num_rows)
    num_partial = each + (torch.arange(num_rows, device=energy.device) < rest).long()
    if (num_partial > per_v).any():
        return None
    in_v = _first(passed[order], per_v - num_partial)
    in_u = _first(~in_v, num_partial * per_u)
    in_v, in_u = (torch.zeros_like(chosen).scatter(1, order, chosen) for chosen in (in_v, in_u))
    return _Split(passed, num_partial, in_v, in_u, float(energy[in_v | in_u].sum()))


def _first(eligible: Tensor, counts: Tensor) -> Tensor:
    """The first `counts[r]` eligible places of every row r."""
    return eligible & (eligible.cumsum(1) <= counts[:, None])


def _factors(tiles: Tensor, split: _Split, num_inner: int) -> tuple[Tensor, Tensor]:
    """U (D, C, b, b) and V (R, D, b, b), every inner unit with equal norms on both sides."""
    num_rows, width, tile, _ = tiles.shape
    inner, outer = tiles.new_zeros(num_inner, width, tile, tile), tiles.new_zeros(num_rows, num_inner, tile, tile)
    same = torch.eye(tile, dtype=tiles.dtype, device=tiles.device)
    num_passed = int(split.passed.sum())
    units = torch.arange(num_inner, device=tiles.device)
    inner[units[:num_passed], split.passed.nonzero()[:, 0]] = same
    rows, columns = split.in_v.nonzero(as_tuple=True)
    outer[rows, (split.passed.cumsum(0) - 1)[columns]] = tiles[rows, columns]
    first = num_passed + split.num_partial.cumsum(0) - split.num_partial
    rows_of_parts = torch.arange(num_rows, device=tiles.device).repeat_interleave(split.num_partial)
    outer[rows_of_parts, units[num_passed:]] = same
    place = split.in_u.cumsum(1) - 1
    rows, columns = split.in_u.nonzero(as_tuple=True)
    # consecutive parts of an output take turns, so that each gets about as many entries
    inner[first[rows] + place[rows, columns] % split.num_partial[rows], columns] = tiles[rows, columns]
    sizes = inner.square().sum((1, 2, 3)).sqrt(), outer.square().sum((0, 2, 3)).sqrt()
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1)
    return inner * ratio[:, None, None, None], outer / ratio[:, None, None]
