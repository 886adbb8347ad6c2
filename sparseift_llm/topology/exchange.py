"""The exchange: which active units of a mask are dropped, and which inactive ones are grown in their place.

This is the rule of SET and RigL. It is the same for single weights, for tiles and for heads; only the groups differ,
within which the number of active units is kept (see groups.py). Who calls it, when, and with which scores is decided in
training/algorithms.py. All functions are pure, and ties break by index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseift_llm.topology.connected import last_of_lines
from sparseift_llm.topology.groups import Groups


def drop_and_grow(
    mask: Tensor,
    importance: Tensor,
    growth: Tensor,
    num_exchanged: Tensor,
    groups: Groups,
    connected: tuple[int, ...] | None = None,
    only_moving: bool = False,
) -> Tensor:
    """In every group drop the active units of least importance, then grow as many of largest `growth`.

    A unit that was just dropped competes for growth like any other inactive one, so it may come back.

    Args:
        mask: current mask, bool.
        importance: score of active units, of the mask's shape; |w| in the reference.
        growth: score of inactive units, of the mask's shape, finite; looked at where the mask is 0 after the drop.
        num_exchanged: units to drop and to grow in each group, int (G,); cut to what the group has active. It may be
            more than were inactive, because dropped units can be grown again.
        groups: the groups.
        connected: None for the rule of the reference. Otherwise the last active unit of a line is not dropped, the
            lines being those along these dimensions (see connected.py), and `only_moving` is true.
        only_moving: a unit whose growth score is 0 is not grown: instead the most important one that would have been
            dropped stays.

    Returns:
        New mask with as many ones in every group as `mask`.

    Source: RigL, arXiv 1911.11134, algorithm 1.
    """
    num_exchanged = num_exchanged.to(mask.device).minimum(groups.count(mask))
    if connected is None:
        dropped = groups.largest(-importance, mask, num_exchanged)
    else:
        dropped = _least_but_last(mask, importance, num_exchanged, groups, connected)
    return groups.regrown(mask, dropped, importance, growth, only_moving or connected is not None)


def _least_but_last(
    mask: Tensor, importance: Tensor, num_exchanged: Tensor, groups: Groups, dims: tuple[int, ...]
) -> Tensor:
    """The active units of least importance in every group, but of no line all of them.

    Where all units of a line are among the least, the most important of them is set aside and the choice is made again
    without it, so that another unit of its group is dropped in its place if there is one.
    """
    set_aside = torch.zeros_like(mask)
    while True:
        eligible = mask & ~set_aside
        dropped = groups.largest(-importance, eligible, num_exchanged.minimum(groups.count(eligible)))
        last = last_of_lines(mask, mask & ~dropped, importance, dims)
        if not last.any():
            return dropped
        set_aside |= last
