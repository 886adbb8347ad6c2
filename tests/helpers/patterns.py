"""The rule of n:m masks written down a second time, with sorted lists in place of tensors. No tests stand here."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.layers.masked import MaskedProjection


def by_hand(mask: Tensor, importance: Tensor, growth: Tensor, num_dropped: int, m: int) -> Tensor:
    """The next mask, all of shape (out, in): drop the least important of all, and grow in the group what it lost.

    Among equals the earlier weight goes first, in both.
    """
    active, size, score = mask.flatten().tolist(), importance.flatten().tolist(), growth.flatten().tolist()
    places = [place for place, is_active in enumerate(active) if is_active]
    dropped = sorted(places, key=lambda place: (size[place], place))[:num_dropped]
    for place in dropped:
        active[place] = False
    lost: dict[int, int] = {}
    for place in dropped:
        lost[place // m] = lost.get(place // m, 0) + 1
    for group, number in lost.items():
        free = [place for place in range(group * m, group * m + m) if not active[place]]
        for place in sorted(free, key=lambda place: (-score[place], place))[:number]:
            active[place] = True
    return torch.tensor(active).view(mask.shape)


@cache
def _patterns(n: int, m: int) -> list[tuple[int, ...]]:
    """The places of all patterns with n of m in every row and column of a block, row by row."""
    chosen = product(combinations(range(m), n), repeat=m)
    even = [lines for lines in chosen if all(sum(column in line for line in lines) == n for column in range(m))]
    return [tuple(row * m + column for row, line in enumerate(lines) for column in line) for lines in even]


def by_hand_in_blocks(
    mask: Tensor, importance: Tensor, growth: Tensor, num_dropped: int, n: int, m: int, only_moving: bool = False
) -> Tensor:
    """The next transposable mask: drop the least important of all; each block takes the best pattern around the rest.

    The best has the largest sum of growth scores; among equals the first one in the order of `_patterns` counts.
    With `only_moving` nothing is grown for a score of 0.
    """
    width = mask.shape[1]
    places = [place for place, is_active in enumerate(mask.flatten().tolist()) if is_active]
    size, score = importance.flatten().tolist(), growth.flatten().tolist()
    active = set(places)
    kept = active - set(sorted(places, key=lambda place: (size[place], place))[:num_dropped])
    found: list[int] = []
    for top, left in product(range(0, mask.shape[0], m), range(0, width, m)):
        block = [(top + row) * width + left + column for row in range(m) for column in range(m)]
        stays = {place for place in range(m * m) if block[place] in kept}
        frozen = {place for place in range(m * m) if block[place] not in active and score[block[place]] <= 0}
        best, most = (), -1.0
        for pattern in _patterns(n, m):
            if stays.issubset(pattern) and not (only_moving and frozen.intersection(pattern)):
                total = sum(score[block[place]] for place in pattern if place not in stays)
                best, most = (pattern, total) if total > most else (best, most)
        found += [block[place] for place in best]
    result = torch.zeros(mask.numel(), dtype=torch.bool)
    result[found] = True
    return result.view(mask.shape)


def is_patterned(mask: Tensor, n: int, m: int) -> bool:
    """Whether of every m neighbours n are active, along both sides."""
    return all(bool((side.unfold(1, m, m).sum(2) == n).all()) for side in (mask, mask.T))


def outputs_first(layer: Any, tensor: Tensor) -> Tensor:
    """(out, in), whichever way a layer stores it."""
    return tensor.T if hasattr(layer, "nf") else tensor


def wrong_groups(model: nn.Module, n: int, m: int, transposable: bool = False) -> list[str]:
    """The sparse layers of which some m neighbouring inputs of an output do not have n active weights.

    With `transposable` or m neighbouring outputs of an input.
    """
    found = []
    for name, layer in sparse_layers(model).items():
        assert isinstance(layer, MaskedProjection)
        mask = outputs_first(layer, layer.mask)
        sides = (mask, mask.T) if transposable else (mask,)
        if any((side.unfold(1, m, m).sum(2) != n).any() for side in sides):
            found.append(name)
    return found
