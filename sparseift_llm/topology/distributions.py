"""How a total number of active weights is shared among layers, exactly. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def uniform(sizes: Sequence[int], total_active: int) -> list[int]:
    """Active weights per layer at one density for all layers.

    Args:
        sizes: weights per layer.
        total_active: active weights of all layers together, in [0, sum(sizes)].

    Returns:
        One count per layer, none above its size, adding up to `total_active` exactly.

    Raises:
        ValueError: `total_active` is out of range.

    >>> uniform([100, 300], 101)
    [25, 76]
    """
    _check_total(sizes, total_active)
    density = Fraction(total_active, sum(sizes))
    return round_to_total([density * size for size in sizes], sizes, total_active)


def erdos_renyi_kernel(shapes: Sequence[tuple[int, int]], total_active: int) -> list[int]:
    """Active weights per layer with densities proportional to (out + in) / (out * in).

    Layers whose density would pass 1 become dense and the rest is solved again, so that the total
    is met exactly. Source: SET, arXiv 1707.04780; RigL, arXiv 1911.11134, section 3.

    Args:
        shapes: (out, in) per layer.
        total_active: active weights of all layers together.

    Returns:
        One count per layer, none above its size, adding up to `total_active` exactly.

    Raises:
        ValueError: `total_active` is out of range.

    >>> erdos_renyi_kernel([(10, 10), (10, 40)], 70)
    [20, 50]
    """
    sizes = [rows * columns for rows, columns in shapes]
    _check_total(sizes, total_active)
    saturated: set[int] = set()
    while True:
        free = [index for index in range(len(sizes)) if index not in saturated]
        left = total_active - sum(sizes[index] for index in saturated)
        sides = sum(sum(shapes[index]) for index in free)
        ideal = [Fraction(sizes[index]) for index in range(len(sizes))]
        for index in free:
            ideal[index] = Fraction(left * sum(shapes[index]), sides)
        overfull = {index for index in free if ideal[index] > sizes[index]}
        if not overfull:
            return round_to_total(ideal, sizes, total_active)
        saturated |= overfull


def _check_total(sizes: Sequence[int], total_active: int) -> None:
    if not 0 <= total_active <= sum(sizes):
        raise ValueError(f"{total_active} active weights asked for, but the layers hold 0 to {sum(sizes)}")


def round_to_total(ideal: Sequence[Fraction], sizes: Sequence[int], total: int) -> list[int]:
    """Largest-remainder rounding of `ideal`, which adds up to `total`; ties go to the earlier layer."""
    counts = [int(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda index: (counts[index] - ideal[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    assert sum(counts) == total
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    return counts
