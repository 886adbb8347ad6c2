"""Groups of units, each of which keeps its number of active ones when a mask changes.

A unit is one entry of a mask: a weight or a tile. The whole matrix may be one group (`WholeMatrix`, the rule of the
reference), equal parts of it may be groups (`EqualGroups`: block-rows of tiles, or attention heads; `InputGroups`: the
m neighbours of an n:m mask), or sets of rows of any size (`RowSets`: the queries, keys and values that share a matrix),
which may be divided into heads in turn. Blocks of masks that are n:m along both sides are in transposable.py.

Legend: G = number of groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparseift_llm.record.specs import RowGroup
from sparseift_llm.topology.masks import largest, largest_per_row, random_mask, random_scores


class Groups(ABC):
    """How the units of a mask are divided. Every unit is in one group; groups have an order."""

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """Ones of `mask` in every group: int64 (G,)."""

    @abstractmethod
    def largest(self, scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
        """Mask of the `counts[g]` eligible units of group g with the largest scores, for all g.

        Args:
            scores: of the mask's shape, finite where eligible.
            eligible: bool, of the mask's shape, with at least `counts[g]` ones in group g.
            counts: int (G,).

        Returns:
            Bool, of the mask's shape; among equal scores the lower index wins.
        """

    @abstractmethod
    def share(self, num_active: int) -> Tensor:
        """`num_active` units shared among the groups: int64 (G,)."""

    @abstractmethod
    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        """How many of its active units each group exchanges: int64 (G,).

        Args:
            mask: bool.
            importance: score of active units, of the mask's shape.
            fraction: share to exchange, in [0, 1].
            phase: in [0, 1), another one at each update; see `changes_per_row`.
        """

    def first_mask(self, shape: torch.Size, num_active: int, seed: int) -> Tensor:
        """A random mask with `num_active` ones, uniform within every group, which has its share of them.

        Args:
            shape: of the mask, two sides.
            num_active: ones, in [0, number of units].
            seed: see `derive_seed`.

        Returns:
            Bool tensor of `shape` on the CPU.

        >>> heads = EqualGroups(dim=0, number=2)
        >>> heads.count(heads.first_mask(torch.Size((4, 3)), 5, 0))
        tensor([2, 3])
        """
        scores = random_scores(shape, seed)
        return self.largest(scores, torch.ones_like(scores, dtype=torch.bool), self.share(num_active))

    def regrown(
        self, mask: Tensor, dropped: Tensor, importance: Tensor, growth: Tensor, only_moving: bool = False
    ) -> Tensor:
        """`mask` without `dropped`, and with as many others of the largest growth scores in every group.

        Args:
            mask: bool.
            dropped: bool, ones of `mask`. They compete like units that were inactive before, so they may come back.
            importance, growth: scores of the mask's shape, see `drop_and_grow`.
            only_moving: grow nothing of score 0; the most important dropped units come back instead.

        Returns:
            Bool, of the mask's shape, with as many ones in every group as `mask`.
        """
        kept, numbers = mask & ~dropped, self.count(dropped)
        grown = self.largest(growth, ~kept, numbers)
        if not only_moving:
            return kept | grown
        grown &= growth > 0
        return kept | grown | self.largest(importance, dropped & ~grown, numbers - self.count(grown))


class WholeMatrix(Groups):
    """One group: any unit may take the place of any other."""

    def count(self, mask: Tensor) -> Tensor:
        return mask.sum().view(1)

    def largest(self, scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
        return largest(scores, eligible, int(counts))  # without sorting all of a matrix

    def share(self, num_active: int) -> Tensor:
        return torch.tensor([num_active])

    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        return torch.tensor([int(fraction * int(mask.sum()))])

    def first_mask(self, shape: torch.Size, num_active: int, seed: int) -> Tensor:
        return random_mask(shape, num_active, seed)


@dataclass(frozen=True)
class EqualGroups(Groups):
    """Groups of equally many neighbouring rows or columns: block-rows of tiles, or attention heads.

    In a projection that makes queries, keys or values, a head is the rows of its outputs. In the projection behind the
    attention, a head is the columns of its inputs. Counts of groups differ by at most one where `share` gives them.

    Args:
        dim: of the mask, 0 or 1, along which groups follow each other.
        number: of groups; divides that side.
    """

    dim: int
    number: int

    def count(self, mask: Tensor) -> Tensor:
        return self._rows(mask).sum(1)

    def largest(self, scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
        chosen = largest_per_row(self._rows(scores), self._rows(eligible), counts)
        if self.dim == 0:
            return chosen.view(scores.shape)
        return chosen.view(scores.shape[1], scores.shape[0]).T.contiguous()

    def share(self, num_active: int) -> Tensor:
        return row_starts(num_active, self.number).diff().long()

    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        return changes_per_row(self.count(mask), fraction, phase)

    def _rows(self, tensor: Tensor) -> Tensor:
        """One row per group: (G, everything in it)."""
        return (tensor if self.dim == 0 else tensor.T).reshape(self.number, -1)


class InputGroups(EqualGroups):
    """The groups of an n:m mask: m neighbouring inputs of one output, of which n are active.

    What is dropped is chosen in the whole matrix, as in the reference, and not in each group: few groups of four have a
    weight to spare, and it matters which. Each group then grows as many as it lost.

    Args:
        dim: of the mask, along which outputs lie: 0, or 1 where it is stored as (in, out).
        number: of groups, all weights over m.

    Source: dropping in a matrix and growing within parts of constant number, arXiv 2305.02299 (there parts are rows).

    >>> pairs = InputGroups(dim=0, number=2)
    >>> mask, size = torch.tensor([[True, False, False, True]]), torch.tensor([[0.1, 0.0, 0.0, 0.3]])
    >>> pairs.num_exchanged(mask, size, 0.5, 0.0)
    tensor([1, 0])
    """

    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        return self.count(largest(-importance, mask, int(fraction * int(mask.sum()))))


@dataclass(frozen=True)
class RowSets(Groups):
    """Sets of output rows, as if each were a matrix of its own: the projections that share a fused matrix.

    Args:
        dim: of the mask, along which the outputs lie: 0, or 1 where it is stored as (in, out).
        sets: disjoint sets that hold all rows, with the active units that the plan gives each.
        head_size: rows of an attention head, whose numbers of active units are kept equal within each set; None if
            a set is one group.
    """

    dim: int
    sets: tuple[RowGroup, ...]
    head_size: int | None = None

    def count(self, mask: Tensor) -> Tensor:
        return torch.cat([inner.count(part) for inner, part in self._parts(mask)])

    def largest(self, scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
        result = torch.zeros_like(eligible)
        parts = zip(self.sets, self._parts(scores), self._parts(eligible), self._split(counts), strict=True)
        for rows, (inner, part), (_, allowed), number in parts:
            result.index_copy_(self.dim, self._rows(rows, result.device), inner.largest(part, allowed, number))
        return result

    def share(self, num_active: int) -> Tensor:
        """What the plan gives every set. `num_active` is what it gives them together."""
        assert num_active == sum(rows.num_active for rows in self.sets)
        return torch.cat([self._inner(rows).share(rows.num_active) for rows in self.sets])

    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        parts = zip(self._parts(mask), self._parts(importance), strict=True)
        return torch.cat([inner.num_exchanged(part, scores, fraction, phase) for (inner, part), (_, scores) in parts])

    def _inner(self, rows: RowGroup) -> Groups:
        return WholeMatrix() if self.head_size is None else EqualGroups(self.dim, rows.num_rows // self.head_size)

    def _parts(self, tensor: Tensor) -> list[tuple[Groups, Tensor]]:
        rows = [self._rows(rows, tensor.device) for rows in self.sets]
        return [(self._inner(x), tensor.index_select(self.dim, y)) for x, y in zip(self.sets, rows, strict=True)]

    def _split(self, counts: Tensor) -> tuple[Tensor, ...]:
        return counts.split([1 if self.head_size is None else x.num_rows // self.head_size for x in self.sets])

    @staticmethod
    def _rows(rows: RowGroup, device: torch.device) -> Tensor:
        starts = torch.arange(rows.repeats, device=device) * (rows.period or 0)
        return (starts[:, None] + torch.arange(rows.start, rows.stop, device=device)).flatten()


def row_starts(num_units: int, num_rows: int) -> Tensor:
    """First of `num_units` units in every row where rows differ by at most one unit, and their number: int32 (R + 1,).

    >>> row_starts(5, 3).tolist()
    [0, 1, 3, 5]
    """
    return (torch.arange(num_rows + 1) * num_units // num_rows).int()


def changes_per_row(counts: Tensor, fraction: float, phase: float) -> Tensor:
    """How many units every row exchanges: its share of `fraction`, rounded so that the total comes out.

    With few units in a row, rounding each share down would leave 0 in every row and masks that never
    change. Instead running totals are rounded, from a random phase, so that rows take turns.

    Args:
        counts: active units per row, int (R,).
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
