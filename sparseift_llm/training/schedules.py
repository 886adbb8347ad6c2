"""When masks change and by how much, as functions of the optimizer step (1 = after the first step)."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def constant_drop_fraction(step: int, stop: int, initial: float) -> float:
    """The same share at every update: `initial`."""
    return initial


def exponential_drop_fraction(step: int, stop: int, initial: float) -> float:
    """Share dropped at `step` where it falls by the same factor each step, to a hundredth at `stop`.

    >>> round(exponential_drop_fraction(375, 750, 0.3), 6)
    0.03
    """
    return initial * 0.01 ** (step / stop)


DROP_SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "cosine": cosine_drop_fraction,
    "constant": constant_drop_fraction,
    "exponential": exponential_drop_fraction,
}


def start_step(total_steps: int, start_fraction: float) -> int:
    """Last optimizer step before gradual pruning begins: 0 if it begins at once.

    >>> start_step(1000, 0.25)
    250
    """
    return int(total_steps * Fraction(str(start_fraction)))


def cubic_sparsity(step: int, stop: int, final: float, start: int = 0) -> float:
    """Sparsity of gradual magnitude pruning at `step`: final * (1 - (1 - (step - start) / (stop - start))^3).

    Source: Zhu and Gupta, arXiv 1710.01878, eq. 1.

    >>> cubic_sparsity(50, 100, 0.8)
    0.7
    >>> cubic_sparsity(75, 100, 0.8, start=50)
    0.7
    """
    if step <= start:
        return 0.0
    return final * (1 - (1 - (min(step, stop) - start) / (stop - start)) ** 3)
