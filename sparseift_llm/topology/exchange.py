"""The exchange: which active units of a mask are dropped, and which inactive ones are grown in their place.

This is the rule of SET and RigL. It is the same for single weights, for tiles and for heads; only the groups differ,
within which the number of active units is kept (see groups.py). Who calls it, when, and with which scores is decided in
training/algorithms.py. All functions are pure, and ties break by index.
"""

from __future__ import annotations

from torch import Tensor

from sparseift_llm.topology.groups import Groups


def drop_and_grow(mask: Tensor, importance: Tensor, growth: Tensor, num_exchanged: Tensor, groups: Groups) -> Tensor:
    """In every group drop the active units of least importance, then grow as many of largest `growth`.

    A unit that was just dropped competes for growth like any other inactive one, so it may come back.

    Args:
        mask: current mask, bool.
        importance: score of active units, of the mask's shape; |w| in the reference.
        growth: score of inactive units, of the mask's shape, finite; looked at where the mask is 0 after the drop.
        num_exchanged: units to drop and to grow in each group, int (G,); cut to what the group has active. It may be
            more than were inactive, because dropped units can be grown again.
        groups: the groups.

    Returns:
        New mask with as many ones in every group as `mask`.

    Source: RigL, arXiv 1911.11134, algorithm 1.
    """
    num_exchanged = num_exchanged.to(mask.device).minimum(groups.count(mask))
    kept = mask & ~groups.largest(-importance, mask, num_exchanged)
    return kept | groups.largest(growth, ~kept, num_exchanged)
