"""When masks change and by how much, as functions of the optimizer step (1 = after the first step)."""

from __future__ import annotations

import math
from fractions import Fraction


def stop_step(total_steps: int, stop_fraction: float) -> int:
    """First optimizer step at which masks are final, at least 1.

    >>> stop_step(1000, 0.75)
    750
    """
    return max(1, int(total_steps * Fraction(str(stop_fraction))))  # 0.29 of 100 is 29, not 28.99


def is_update_step(step: int, update_every_steps: int, stop: int) -> bool:
    """Whether masks are updated right after optimizer step `step` (drop-and-grow algorithms).

    >>> [step for step in range(1, 13) if is_update_step(step, 4, 12)]
    [4, 8]
    """
    return 0 < step < stop and step % update_every_steps == 0


def is_pruning_step(step: int, update_every_steps: int, stop: int) -> bool:
    """Like `is_update_step`, with `stop` itself added so that gradual pruning ends on its target.

    >>> [step for step in range(1, 13) if is_pruning_step(step, 4, 10)]
    [4, 8, 10]
    """
    return is_update_step(step, update_every_steps, stop) or step == stop


def cosine_drop_fraction(step: int, stop: int, initial: float) -> float:
    """Share of active weights dropped at `step`: initial / 2 * (1 + cos(pi * step / stop)).

    Source: RigL, arXiv 1911.11134, section 3.

    >>> cosine_drop_fraction(375, 750, 0.3)
    0.15
    """
    return initial / 2 * (1 + math.cos(math.pi * step / stop))


def cubic_sparsity(step: int, stop: int, final: float) -> float:
    """Sparsity of gradual magnitude pruning at `step`: final * (1 - (1 - step / stop)^3).

    Source: Zhu and Gupta, arXiv 1710.01878, eq. 1.

    >>> cubic_sparsity(50, 100, 0.8)
    0.7
    """
    return final * (1 - (1 - min(step, stop) / stop) ** 3)
