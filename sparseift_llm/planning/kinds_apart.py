"""Fused matrices counted as if the projections in them were matrices of their own: queries, keys, values; gate and up.

A reference implementation has a matrix for each, with a sparsity of its own that no mask update changes. In one matrix
with one budget RigL would move density to where gradients are larger, from queries and keys to values.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from transformers import PreTrainedConfig

from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.models.fused_rows import RowPattern, row_pattern
from sparseift_llm.models.projections import Projection
from sparseift_llm.record.specs import RowGroup
from sparseift_llm.topology.distributions import round_to_total


def patterns_of(
    projections: Sequence[Projection], is_sparse: Sequence[bool], hf_config: PreTrainedConfig, config: SparseIFTConfig
) -> list[RowPattern | None]:
    """The rows of every sparse projection that is fused of several, by kind; None for the others.

    All are None where kinds are not to be told apart: without `kinds_apart`, with n:m masks, whose rows keep their
    numbers anyway, and with tiles, whose block-rows do, unless `erk` has to know the shapes.

    Args:
        projections: of a model with `hf_config`.
        is_sparse: which of them become sparse.
        hf_config: as wide as the projections are.
        config: the transformation.

    Raises:
        ValueError: a projection is fused in an order of rows that is not known, and masks would change.
    """
    if not config.kinds_apart or (config.structure != "unstructured" and config.distribution != "erk"):
        return [None] * len(projections)
    return [
        _pattern(projection, hf_config, config) if chosen else None
        for projection, chosen in zip(projections, is_sparse, strict=True)
    ]


def _pattern(projection: Projection, hf_config: PreTrainedConfig, config: SparseIFTConfig) -> RowPattern | None:
    try:
        pattern = row_pattern(projection, hf_config)
    except ValueError as error:
        if config.dst.algorithm == "static" and config.distribution == "uniform":
            return None  # a random mask has the same density everywhere, and it stays
        raise ValueError(
            f"{error}, so that each of them cannot keep its number of active weights under "
            f"algorithm={config.dst.algorithm!r} and distribution={config.distribution!r}. With kinds_apart=False they "
            f"share one number, and {config.dst.algorithm} may move density between them; or use algorithm='static', "
            f"structure='block', or exclude {', '.join(projection.kinds)} with "
            "accounting='whole_model'"
        ) from error
    size = config.block_size or 1
    if pattern is None or any(_num_rows(pattern, kind) % size for kind in pattern.kinds):
        return None  # part of a tile is not a shape that tiles can be counted in
    return pattern


def parts_of(shape: tuple[int, int], pattern: RowPattern | None, tile: int = 1) -> list[tuple[int, int]]:
    """The shapes (out, in) of the matrices that a fused one stands for, in order of kinds; its own if it is not fused.

    Args:
        shape: (out, in) in tiles of side `tile`.
        pattern: its rows, in single rows.

    >>> parts_of((6, 5), RowPattern((("q", 2), ("k", 1)), 2))
    [(4, 5), (2, 5)]
    """
    if pattern is None:
        return [shape]
    return [(_num_rows(pattern, kind) // tile, shape[1]) for kind in pattern.kinds]


def split_evenly(num_units: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """`num_units` active ones shared among matrices at one density for all.

    >>> split_evenly(7, [(4, 5), (2, 5)])
    [5, 2]
    """
    sizes = [rows * columns for rows, columns in shapes]
    return round_to_total([Fraction(num_units * size, sum(sizes)) for size in sizes], sizes, num_units)


def row_groups(pattern: RowPattern | None, counts: Sequence[int]) -> tuple[RowGroup, ...]:
    """The groups that a record holds, from active weights by kind; none if the matrix is not fused.

    >>> [group.rows for group in row_groups(RowPattern((("q", 2), ("k", 1)), 2), [9, 5])]
    [[0, 1, 3, 4], [2, 5]]
    """
    if pattern is None:
        return ()
    period = pattern.num_rows // pattern.repeats if pattern.repeats > 1 else None
    groups, start = [], 0
    for (kind, number), count in zip(pattern.pattern, counts, strict=True):
        groups.append(RowGroup(kind, start, start + number, count, pattern.repeats, period))
        start += number
    return tuple(groups)


def _num_rows(pattern: RowPattern, kind: str) -> int:
    return pattern.repeats * sum(number for name, number in pattern.pattern if name == kind)
