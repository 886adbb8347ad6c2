"""Masks that are n:m along both sides: in every m x m block, each row and each column has n active weights.

Kernels for n:m matrices want the zeros along the side that is summed over. Of a mask such as these, the transpose is
n:m too, so that the gradient of the input can run on them as the output does.

Source: "transposable masks", Hubara et al., arXiv 2102.08124.

Legend: P = patterns of a block (90 of 2:4), B = blocks of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from sparseift_llm.topology.groups import Groups
from sparseift_llm.topology.masks import largest, largest_per_row, random_scores

_BLOCKS_AT_ONCE = 4096  # 3 MB of sums for the patterns of 2:4, which stay in a processor's cache


@cache
def _lines(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """The ways to choose n of m places."""
    return tuple(combinations(range(m), n))


@cache
def _lines_of_patterns(n: int, m: int) -> Tensor:
    """Every pattern of a block, as the number of the line (see `_lines`) in each of its rows: int64 (P, m)."""
    lines = _lines(n, m)
    rows = product(range(len(lines)), repeat=m)
    return torch.tensor([row for row in rows if all(sum(c in lines[r] for r in row) == n for c in range(m))])


@cache
def block_patterns(n: int, m: int) -> Tensor:
    """All masks of m x m with n ones in every row and column: bool (P, m, m), in a fixed order.

    >>> len(block_patterns(2, 4))
    90
    """
    lines = torch.zeros(len(_lines(n, m)), m, dtype=torch.bool)
    lines.scatter_(1, torch.tensor(_lines(n, m)), True)
    return lines[_lines_of_patterns(n, m)]


@dataclass(frozen=True)
class TransposableBlocks(Groups):
    """The m x m blocks of a mask, each of which has one of the patterns of n:m along both sides.

    What is dropped is chosen in the whole matrix, as by `InputGroups`. A block then takes, of the patterns that hold
    all weights that it has left, the one with the largest growth scores. The pattern that it had is one of them. Where
    it has lost a single weight it is the only one, because a row and a column lack a weight, and they cross there.

    Args:
        n, m: as in n:m; m divides both sides of the mask.
    """

    n: int
    m: int

    def count(self, mask: Tensor) -> Tensor:
        return self._blocks(mask).sum((0, 1))

    def largest(self, scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
        rows = [self._blocks(tensor).flatten(0, 1).T for tensor in (scores, eligible)]
        return self._unblocked(largest_per_row(rows[0], rows[1], counts).T.unflatten(0, (self.m, self.m)), scores.shape)

    def share(self, num_active: int) -> Tensor:
        return torch.full((num_active // (self.n * self.m),), self.n * self.m)

    def num_exchanged(self, mask: Tensor, importance: Tensor, fraction: float, phase: float) -> Tensor:
        return self.count(largest(-importance, mask, int(fraction * int(mask.sum()))))

    def first_mask(self, shape: torch.Size, num_active: int, seed: int) -> Tensor:
        patterns = block_patterns(self.n, self.m)
        chosen = random_scores(torch.Size((len(self.share(num_active)),)), seed).mul(len(patterns)).long()
        return self._unblocked(patterns[chosen].permute(1, 2, 0), shape)

    def regrown(
        self, mask: Tensor, dropped: Tensor, importance: Tensor, growth: Tensor, only_moving: bool = False
    ) -> Tensor:
        if only_moving:
            growth = growth.masked_fill(~mask & (growth <= 0), -torch.inf)
        return self.best(growth, mask & ~dropped)

    def best(self, scores: Tensor, kept: Tensor | None = None) -> Tensor:
        """The mask whose active weights have the largest sum of `scores` in every block.

        Sums are taken in float64 and in one order, so that all machines choose the same; among equals the earlier
        pattern of `block_patterns` wins.

        Args:
            scores: of the mask's shape, finite; or minus infinity for what may not be active, if there is a pattern
                without it.
            kept: bool, weights that have to be active, for which there is a pattern; None for none.

        Returns:
            Bool, of the mask's shape.
        """
        kept = torch.zeros_like(scores, dtype=torch.bool) if kept is None else kept
        present = self._blocks(scores.double().masked_fill(kept, 0))
        absent = self._blocks(torch.zeros_like(scores, dtype=torch.float64).masked_fill(kept, -torch.inf))
        patterns = block_patterns(self.n, self.m).to(scores.device)
        parts = zip(present.split(_BLOCKS_AT_ONCE, 2), absent.split(_BLOCKS_AT_ONCE, 2), strict=True)
        best = torch.cat([self._best_pattern(*part) for part in parts])
        return self._unblocked(patterns[best].permute(1, 2, 0), scores.shape)

    def _best_pattern(self, present: Tensor, absent: Tensor) -> Tensor:
        """The numbers (B,) of the patterns with the largest sums.

        An active place adds its entry of `present` (m, m, B), another one that of `absent`, which is 0 or, where the
        place has to be active, minus infinity. Each row of a block has few lines to choose from, so these are added up
        first, and patterns out of them.
        """
        lines = torch.tensor(_lines(self.n, self.m), device=present.device)
        others = torch.tensor([[c for c in range(self.m) if c not in line] for line in lines.tolist()]).to(lines.device)
        of_lines = [present.index_select(1, places) for places in lines.T]
        of_lines += [absent.index_select(1, places) for places in others.T]
        line_sums = of_lines[0]
        for terms in of_lines[1:]:
            line_sums = line_sums + terms  # (m, ways to choose n of m places, B)
        of_rows = zip(line_sums, _lines_of_patterns(self.n, self.m).to(lines.device).T, strict=True)
        sums = [of_row.index_select(0, numbers) for of_row, numbers in of_rows]
        total = sums[0]
        for terms in sums[1:]:
            total = total + terms  # (P, B)
        return total.max(0).indices

    def _blocks(self, tensor: Tensor) -> Tensor:
        """A view (m, m, B) of a mask or of scores: rows and columns of a block, and blocks."""
        return tensor.unflatten(1, (-1, self.m)).unflatten(0, (-1, self.m)).permute(1, 3, 0, 2).flatten(2)

    def _unblocked(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_blocks`, contiguous."""
        whole = blocks.reshape(self.m, self.m, shape[0] // self.m, shape[1] // self.m)
        return whole.permute(2, 0, 3, 1).reshape(shape)
