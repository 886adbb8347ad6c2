"""The rule of n:m masks written down a second time, with sorted lists in place of tensors. No tests stand here."""

from __future__ import annotations

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


def outputs_first(layer: Any, tensor: Tensor) -> Tensor:
    """(out, in), whichever way a layer stores it."""
    return tensor.T if hasattr(layer, "nf") else tensor


def wrong_groups(model: nn.Module, n: int, m: int) -> list[str]:
    """The sparse layers of which some m neighbouring inputs of an output do not have n active weights."""
    found = []
    for name, layer in sparse_layers(model).items():
        assert isinstance(layer, MaskedProjection)
        if (outputs_first(layer, layer.mask).unfold(1, m, m).sum(2) != n).any():
            found.append(name)
    return found
