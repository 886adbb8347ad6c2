"""The names of structures of sparse matrices, and what `n:m` in one of them says."""

from __future__ import annotations

import re

from sparseift_llm.utils.words import not_one_of

STRUCTURES = ("unstructured", "block", "n:m (e.g. 2:4)")  # in words
MAX_TRANSPOSABLE_M = 4  # of a block's patterns 2:4 has 90, but 2:5 has 2,040 and 4:8 more than 10^11
_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def pattern_of(structure: str) -> tuple[int, int] | None:
    """(n, m) of a structure such as `2:4`; None of the others.

    Raises:
        ValueError: no structure has this name, or n is not below m.

    >>> pattern_of("2:4")
    (2, 4)
    """
    if structure in ("unstructured", "block"):
        return None
    found = _PATTERN.fullmatch(structure)
    if found is None:
        raise ValueError(not_one_of("structure", structure, STRUCTURES))
    n, m = int(found[1]), int(found[2])
    if n >= m:
        raise ValueError(f"structure={structure!r}: {n} of {m} neighbours would be active; n must be below m")
    return n, m


def misfit(shape: tuple[int, int], pattern: tuple[int, int], transposable: bool) -> str | None:
    """Which side of a matrix (out, in) does not divide into groups of n:m, in words; None if all do.

    >>> misfit((6, 8), (2, 4), True)
    '6 outputs'
    """
    outputs, inputs = shape
    if inputs % pattern[1]:
        return f"{inputs} inputs"
    return f"{outputs} outputs" if transposable and outputs % pattern[1] else None


def sparsity_of(pattern: tuple[int, int]) -> float:
    """The zero fraction of (n, m): 1 - n / m.

    >>> sparsity_of((1, 4))
    0.75
    """
    n, m = pattern
    return (m - n) / m
