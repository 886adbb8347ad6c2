"""Where one matrix begins on trained weights: its values and active units, and what units get that are new.

Which values a family lays into which matrix is in the family's own file. A unit of the mask is a weight or a tile; a
hidden unit is an output of one matrix (a row) and an input of the next (a column).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseift_llm.layers.composite import Part
from sparseift_llm.topology.blocks import tile_sums
from sparseift_llm.topology.groups import EqualGroups, Groups, WholeMatrix, row_starts
from sparseift_llm.topology.masks import largest, largest_per_row, random_scores
from sparseift_llm.topology.transposable import TransposableBlocks

# The smallest tenth of normally distributed weights holds 0.05% of their sum of squares.
NEW_UNIT_SHARE = 0.1


@dataclass(frozen=True)
class Start:
    """One matrix at the start.

    Args:
        values: (out, in), exactly 0 where inactive.
        mask: bool, one entry per weight (out, in) or tile (R, C); None: all weights are active.
    """

    values: Tensor
    mask: Tensor | None


def start_of_largest(values: Tensor, part: Part, tile: int) -> Start:
    """Keep the part's number of active units where `values` are largest; tiles by L1 norm, within each block-row.

    Of an n:m matrix the n largest of every m; of a transposable one the pattern of the largest sum in every block.

    Args:
        values: (out, in).
        part: the matrix to start; if it is not sparse, all values are kept.
        tile: side of a tile, 1 for single weights.
    """
    if not part.is_sparse:
        return Start(values, None)
    counts, scores = counts_per_row(part, tile).to(values.device), _scores(values, tile)
    if part.transposable:
        mask = blocks_of(part).best(scores)
    else:
        rows = scores.reshape(len(counts), -1)
        mask = largest_units(rows, torch.ones_like(rows, dtype=torch.bool), counts).view(scores.shape)
    return Start(values.masked_fill(~spread(mask, tile, values), 0), mask)


def start_of_inputs(
    values: Tensor, is_old: Tensor, part: Part, tile: int, seed: int, share: float = NEW_UNIT_SHARE
) -> Start:
    """The matrix into hidden units, some of which are new: they get random weights, of the old units' output variance.

    Old units share what the new ones leave by magnitude. With single weights, new ones together get
    `share` of the active weights, spread evenly; with tiles every block-row has its fixed number, and so has every
    group of an n:m matrix.

    Args:
        values: (units, in); rows of new units are not looked at.
        is_old: bool (units,).
        part: the matrix to start.
        tile: side of a tile, 1 for single weights.
        seed: of the random weights and their places.
        share: of the active weights, for new units.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.masked_fill(~is_old[:, None], 0)
    mask = None
    if part.is_sparse:
        is_new = ~is_old.view(-1, tile).any(1)[:, None].expand(-1, part.shape[1] // tile)
        priority = spread_evenly(is_new.shape[0], is_new.shape[1], generator).to(values.device)
        mask = _choose(_scores(values, tile), priority, is_new, part, tile, share)
    active = spread(mask, tile, values)
    old = values[is_old]
    size = math.sqrt(old.square().mean()) if old.any() else 1 / math.sqrt(part.shape[1])
    fan_in = active.sum(1, keepdim=True).clamp(min=1)
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
    noise *= size * (part.shape[1] / fan_in).sqrt()
    return Start(torch.where(is_old[:, None], values, noise).masked_fill(~active, 0), mask)


def start_of_outputs(
    values: Tensor, is_old: Tensor, part: Part, tile: int, seed: int, share: float = NEW_UNIT_SHARE
) -> Start:
    """The matrix out of hidden units, some of which are new: their weights are 0, so that they change no output yet.

    But some are active, so that they learn at once: a `share` of the active ones, at least one tile per
    block-row of two. The rest is given to old units by magnitude.

    Args:
        values: (out, units); columns of new units are not looked at.
        is_old: bool (units,).
        part, tile, seed, share: as for `start_of_inputs`.
    """
    values = values.masked_fill(~is_old, 0)
    if not part.is_sparse:
        return Start(values, None)
    is_new = ~is_old.view(-1, tile).any(1).expand(part.shape[0] // tile, -1)
    if tile == 1:
        generator = torch.Generator().manual_seed(seed)
        priority = spread_evenly(is_new.shape[1], is_new.shape[0], generator).T
    else:
        priority = _take_turns(is_new)
    mask = _choose(_scores(values, tile), priority.to(values.device), is_new, part, tile, share)
    return Start(values.masked_fill(~spread(mask, tile, values), 0), mask)


def singular_factors(weight: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """U (inner, in) and V (out, inner) of the best approximation V U of `weight` (out, in), of rank `inner` at most.

    Each takes the root of the singular values. Rows of U and columns of V beyond the weight's rank are 0.
    At least float32. Source: Eckart and Young, 1936.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = min(inner, int((values > values[0] * max(weight.shape) * torch.finfo(weight.dtype).eps).sum()))
    root = values[:rank].sqrt()
    u, v = weight.new_zeros(inner, weight.shape[1]), weight.new_zeros(weight.shape[0], inner)
    u[:rank], v[:, :rank] = root[:, None] * right[:rank], left[:, :rank] * root
    return u, v


def fill_up(mask: Tensor, part: Part, tile: int, seed: int) -> Tensor:
    """`mask` (R, C) with active units added at random up to the part's number, in every block-row if they are tiles."""
    counts = counts_per_row(part, tile).to(mask.device)
    rows = mask.reshape(len(counts), -1)
    noise = random_scores(rows.shape, seed).to(mask.device)
    return (rows | largest_units(noise, ~rows, counts - rows.sum(1))).view(mask.shape)


def counts_per_row(part: Part, tile: int) -> Tensor:
    """Active units in every row within which they may be chosen: all single weights, a block-row, or a group of n:m.

    Within a transposable matrix the places of a group are not free; see `blocks_of`.
    """
    if part.pattern is not None:
        n, m = part.pattern
        return torch.full((part.num_weights // m,), n)
    num_units = part.num_active // tile**2
    return torch.tensor([num_units]) if tile == 1 else row_starts(num_units, part.shape[0] // tile).diff()


def blocks_of(part: Part) -> TransposableBlocks:
    """The blocks of a transposable matrix."""
    assert part.pattern is not None
    return TransposableBlocks(*part.pattern)


def spread(mask: Tensor | None, tile: int, values: Tensor) -> Tensor:
    """The mask of a matrix's weights from that of its units."""
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    return mask if tile == 1 else mask.repeat_interleave(tile, 0).repeat_interleave(tile, 1)


def largest_units(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[r]` eligible entries of row r with the largest scores; among equals the lower index wins."""
    if len(counts) > 1:
        return largest_per_row(scores, eligible, counts)
    return largest(scores, eligible, int(counts))  # without sorting all of a matrix


def places(scores: Tensor) -> Tensor:
    """Place of every entry of a row (R, C) in the row's ascending order, from 0."""
    order = scores.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )


def _scores(values: Tensor, tile: int) -> Tensor:
    return values.abs() if tile == 1 else tile_sums(values, tile)


def _choose(scores: Tensor, priority: Tensor, is_new: Tensor, part: Part, tile: int, share: float) -> Tensor:
    """The part's number of active units: a share of those of new hidden units by `priority`, the others by `scores`.

    A transposable matrix has as many in every hidden unit, old or new. In a block with both, scores decide first.
    """
    if part.transposable:
        order = (priority - priority.min()) / (priority.max() - priority.min()).clamp(min=1)  # in [0, 1]
        least = 1e-6 * scores.max().double().clamp(min=1e-30)
        return blocks_of(part).best(torch.where(is_new, least * order, scores.double()))
    counts = counts_per_row(part, tile).long()
    groups = WholeMatrix() if len(counts) == 1 else EqualGroups(0, len(counts))
    return share_out(scores, priority, is_new, groups, counts, share)


def share_out(scores: Tensor, priority: Tensor, is_new: Tensor, groups: Groups, counts: Tensor, share: float) -> Tensor:
    """The active units of a mask: in every group a share of new ones by `priority`, and old ones by `scores`.

    Args:
        scores: of old units.
        priority: of new units, of the same shape.
        is_new: bool, of the same shape.
        groups: the groups of units.
        counts: active units of every group.
        share: of a group's active units that are new, at least one of two; more where there are too few old ones, and
            0 for none.

    Returns:
        Bool, of the same shape, with `counts[g]` ones in group g.
    """
    num_old, available = groups.count(~is_new).cpu(), groups.count(is_new).cpu()
    least = torch.where(counts > 1, (share * counts).round().clamp(min=1 if share else 0), 0).long()
    num_new = least.maximum(counts - num_old).minimum(available)
    return groups.largest(scores, ~is_new, counts - num_new) | groups.largest(priority, is_new, num_new)


def spread_evenly(num_units: int, width: int, generator: torch.Generator) -> Tensor:
    """Priorities (units, width) by which all units get one place at random before any gets a second one."""
    order = places(torch.rand(num_units, width, generator=generator, dtype=torch.float64))
    return -(order * num_units + torch.arange(num_units)[:, None]).double()


def _take_turns(is_new: Tensor) -> Tensor:
    """Priorities (R, C) by which block-rows begin at evenly spaced places among the new columns of `is_new` (R, C)."""
    num_rows, num_new = len(is_new), max(1, int(is_new[0].sum()))
    place = is_new[0].cumsum(0) - 1
    first = torch.arange(num_rows, device=is_new.device)[:, None] * num_new // num_rows
    return -((place - first) % num_new).double()
