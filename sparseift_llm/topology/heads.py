"""Unstructured masks in which every attention head has the same number of active weights, to within one.

A head is a group of neighbouring rows or columns of a weight, and all groups are of one size. In a projection that
makes queries, keys or values, a head is the rows of its outputs; where the three are fused, their heads follow one
another. In the projection behind the attention, a head is the columns of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseift_llm.topology.blocks import changes_per_row, drop_and_grow_per_row, largest_per_row, row_starts
from sparseift_llm.topology.masks import random_scores


@dataclass(frozen=True)
class HeadGroups:
    """How a weight is divided into heads.

    Args:
        dim: the dimension of the weight, 0 or 1, along which heads follow each other.
        count: the number of heads, which divides the length of that side.
    """

    dim: int
    count: int

    def rows(self, tensor: Tensor) -> Tensor:
        """One row per head: (count, everything in it)."""
        return (tensor if self.dim == 0 else tensor.T).reshape(self.count, -1)

    def undo(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of `shape` from its `rows`."""
        return rows.view(shape) if self.dim == 0 else rows.view(shape[1], shape[0]).T.contiguous()


def random_mask_per_head(shape: torch.Size, num_active: int, seed: int, heads: HeadGroups) -> Tensor:
    """A random mask with `num_active` ones, uniform within every head.

    Args:
        shape: the weight's shape, two sides.
        num_active: ones, in [0, number of weights].
        seed: see `derive_seed`.
        heads: the groups that share them.

    Returns:
        Bool tensor of `shape` on the CPU; head h has floor((h + 1) * num_active / count) minus floor(h * ...) ones.

    >>> random_mask_per_head(torch.Size((4, 3)), 5, 0, HeadGroups(dim=0, count=2)).view(2, 6).sum(1)
    tensor([2, 3])
    """
    scores = heads.rows(random_scores(shape, seed))
    counts = row_starts(num_active, heads.count).diff()
    return heads.undo(largest_per_row(scores, torch.ones_like(scores, dtype=torch.bool), counts), shape)


def drop_and_grow_per_head(
    mask: Tensor, magnitude: Tensor, growth: Tensor, fraction: float, phase: float, heads: HeadGroups
) -> Tensor:
    """In every head, drop a share of the active weights, the smallest, then grow as many of largest `growth`.

    Args:
        mask: current mask, bool, two sides.
        magnitude: |w|, same shape.
        growth: growth score, same shape, finite.
        fraction: share of active weights to exchange, in [0, 1].
        phase: in [0, 1), see `topology.blocks.changes_per_row`.
        heads: the groups.

    Returns:
        New mask with as many ones in every head as `mask`.

    Source: RigL, arXiv 1911.11134, algorithm 1, within each head.
    """
    rows = heads.rows(mask)
    num_changed = changes_per_row(rows.sum(1), fraction, phase)
    changed = drop_and_grow_per_row(rows, heads.rows(magnitude), heads.rows(growth), num_changed)
    return heads.undo(changed, mask.shape)
