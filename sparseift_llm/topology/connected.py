"""Masks in which no line is left without an active unit. A line is a row or a column of a mask.

An output whose row is empty is only a bias, and an input whose column is empty is read by nothing. `dims` says which
lines matter: 0 stands for columns, which lie along dimension 0, and 1 for rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseift_llm.topology.groups import Groups


def empty_lines(mask: Tensor, dim: int) -> Tensor:
    """Which lines along `dim` have no active unit: bool (length of the other dimension,)."""
    return ~mask.any(dim)


def last_of_lines(mask: Tensor, kept: Tensor, importance: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The most important unit of every line that had active units in `mask` and has none in `kept`.

    Args:
        mask, kept: bool; `kept` has no unit that `mask` has not.
        importance: scores, at least 0, of the mask's shape; among equals the lower index counts.
        dims: which lines.

    Returns:
        Bool, of the mask's shape.
    """
    found = torch.zeros_like(mask)
    for dim in dims:
        lost = empty_lines(kept, dim) & ~empty_lines(mask, dim)
        best = importance.masked_fill(~mask, -1).max(dim).indices.unsqueeze(dim)
        chosen = torch.zeros_like(mask).scatter(dim, best, True)
        found |= chosen & mask & lost.unsqueeze(dim)
    return found


def reconnect(mask: Tensor, scores: Tensor, groups: Groups, dims: tuple[int, ...]) -> Tensor:
    """`mask` with a unit in every line that has none, where the numbers allow it.

    Each such line gets its unit of the largest score whose group can spare another one: a unit whose own lines
    have more. The one of the smallest score goes. Lines are served in order of their index, columns first.

    Args:
        mask: bool, two sides, on the CPU.
        scores: of the mask's shape, finite; random ones of a first mask.
        groups: each keeps its number of active units.
        dims: which lines.
    """
    counts = groups.count(mask)
    for dim in sorted(dims):
        for line in empty_lines(mask, dim).nonzero().flatten().tolist():
            mask = _with_unit_in(line, dim, mask, scores, groups, counts, dims)
    return mask


def _with_unit_in(
    line: int, dim: int, mask: Tensor, scores: Tensor, groups: Groups, counts: Tensor, dims: tuple[int, ...]
) -> Tensor:
    order = scores.select(1 - dim, line).sort(descending=True, stable=True).indices
    for place in order.tolist():
        more = mask.clone()
        more[(place, line) if dim == 0 else (line, place)] = True
        surplus = groups.count(more) - counts
        spare = mask.clone()
        for other in dims:
            spare &= (mask.sum(other) > 1).unsqueeze(other)
        if bool((groups.count(spare) >= surplus).all()):
            return more & ~groups.largest(-scores, spare, surplus)
    return mask
