"""Groups that keep their numbers of active units: what they count, choose and exchange, and their first masks."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.record.specs import RowGroup
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.groups import EqualGroups, Groups, RowSets, WholeMatrix, changes_per_row
from sparseift_llm.topology.masks import derive_seed, random_phase, random_scores


def text(mask: Tensor) -> str:
    return " ".join("".join("1" if active else "0" for active in row) for row in mask.tolist())


# ---- how many to exchange


@pytest.mark.parametrize(
    ("counts", "fraction", "phase", "expected"),
    [
        ([2, 2, 2, 2], 0.25, 0.0, [0, 1, 0, 1]),  # running totals 0.5, 1, 1.5, 2
        ([2, 2, 2, 2], 0.25, 0.5, [1, 0, 1, 0]),  # 1, 1.5, 2, 2.5
        ([1, 1, 1, 1], 0.25, 0.0, [0, 0, 0, 1]),
        ([1, 1, 1, 1], 0.25, 0.75, [1, 0, 0, 0]),
        ([3, 3], 0.5, 0.0, [1, 2]),  # 1.5, 3
        ([3, 3], 0.0, 0.99, [0, 0]),
        ([3, 2], 1.0, 0.5, [3, 2]),
        ([5], 0.25, 0.0, [1]),
        ([5], 0.25, 0.75, [2]),
    ],
)
def test_changes_per_row_by_hand(counts: list[int], fraction: float, phase: float, expected: list[int]) -> None:
    assert changes_per_row(torch.tensor(counts), fraction, phase).tolist() == expected


def check_changes(counts: list[int], fraction: float, phase: float) -> None:
    changes = changes_per_row(torch.tensor(counts), fraction, phase).tolist()
    exact = [Fraction(fraction) * count for count in counts]
    assert all(abs(number - share) < 1 for number, share in zip(changes, exact, strict=True))
    assert all(0 <= number <= count for number, count in zip(changes, counts, strict=True))
    assert sum(changes) == int(sum(exact) + Fraction(phase))


fractions = st.floats(0, 1)
phases = st.floats(0, 1, exclude_max=True)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), fractions, phases)
def test_changes_add_up_and_each_is_within_one(counts: list[int], fraction: float, phase: float) -> None:
    check_changes(counts, fraction, phase)


def rounded_down(counts: Tensor, fraction: float, phase: float) -> Tensor:
    """A fault: each row on its own."""
    return (counts * fraction).long()


def rounded_up(counts: Tensor, fraction: float, phase: float) -> Tensor:
    """A fault: each row on its own."""
    return (counts * fraction).ceil().long()


@pytest.mark.parametrize("fault", [rounded_down, rounded_up])
def test_the_check_of_changes_catches_faults(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    check_changes([2, 2, 3, 2], 0.3, 0.0)
    monkeypatch.setattr("tests.topology.test_groups.changes_per_row", fault)
    with pytest.raises(AssertionError):
        check_changes([2, 2, 3, 2], 0.3, 0.0)


@pytest.mark.parametrize(("tiles", "fraction"), [(1, 0.3), (1, 0.01), (2, 0.1), (3, 0.3)])
def test_few_tiles_in_a_row_still_change_over_many_phases(tiles: int, fraction: float) -> None:
    """Rounding each row's share down would give 0 in every row and for ever; over phases, all get their share."""
    num_rows, num_updates = 16, 2000
    counts = torch.full((num_rows,), tiles)
    phases = [random_phase(derive_seed(0, "phase", step, 0)) for step in range(num_updates)]
    total = sum(changes_per_row(counts, fraction, phase) for phase in phases)
    assert isinstance(total, Tensor)
    share = tiles * fraction
    deviation = (num_updates * (share % 1) * (1 - share % 1)) ** 0.5
    assert bool((total > 0).all())
    assert float((total - num_updates * share).abs().max()) < 5 * deviation


# ---- heads


def exchanged(mask: Tensor, magnitude: Tensor, growth: Tensor, fraction: float, phase: float, groups: Groups) -> Tensor:
    number = groups.num_exchanged(mask, magnitude, fraction, phase)
    return drop_and_grow(mask, magnitude, growth, number, groups)


def test_heads_by_hand() -> None:
    """Two heads of one row each; each gives up its smallest weight for its own largest growth."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    magnitude = torch.tensor([[5.0, 4.0, 0.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    growth = torch.tensor([[0.0, 0.0, 9.0, 8.0], [0.0, 1.0, 0.0, 2.0]])
    expected = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(exchanged(mask, magnitude, growth, 0.5, 0.0, EqualGroups(dim=0, number=2)), expected)
    transposed = exchanged(mask.T, magnitude.T, growth.T, 0.5, 0.0, EqualGroups(dim=1, number=2))
    assert torch.equal(transposed, expected.T)
    whole = exchanged(mask, magnitude, growth, 0.5, 0.0, WholeMatrix())
    assert not torch.equal(whole, expected)  # which lets heads differ


seeds = st.integers(0, 99)
some_heads = st.builds(EqualGroups, dim=st.sampled_from([0, 1]), number=st.integers(1, 6))


@given(
    heads=some_heads, size=st.integers(1, 5), other=st.integers(1, 7), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_counts_are_even_and_the_total_is_exact(
    heads: EqualGroups, size: int, other: int, share: float, seed: int
) -> None:
    shape = torch.Size((heads.number * size, other) if heads.dim == 0 else (other, heads.number * size))
    total = int(share * shape.numel())
    mask = heads.first_mask(shape, total, seed)
    for _ in range(2):
        per_head = mask.unflatten(heads.dim, (heads.number, size)).movedim(heads.dim, 0).flatten(1).sum(1)
        assert int(mask.sum()) == total
        assert int(per_head.max() - per_head.min()) <= 1
        assert torch.equal(heads.count(mask), per_head)
        magnitude, growth = random_scores(shape, seed + 1), random_scores(shape, seed + 2)
        mask = exchanged(mask, magnitude, growth, 0.3, 0.5, heads)


def test_the_first_mask_is_uniform_within_a_head() -> None:
    heads = EqualGroups(dim=0, number=2)
    masks = torch.stack([heads.first_mask(torch.Size((4, 5)), 8, seed) for seed in range(2000)])
    torch.testing.assert_close(masks.double().mean(0), torch.full((4, 5), 0.4, dtype=torch.float64), rtol=0, atol=0.06)


# ---- sets of rows


def test_sets_of_rows_by_hand() -> None:
    """Rows 0 and 2 are of one kind, row 1 of another: each gives up one of its own for its own largest growth."""
    sets = RowSets(0, (RowGroup("q", 0, 1, 3, 2, 2), RowGroup("k", 1, 2, 2)))
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)[:3]
    magnitude = torch.tensor([[9.0, 1.0, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 5.0]])
    growth = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 7.0], [8.0, 3.0, 0.0]])
    assert sets.count(mask).tolist() == [3, 2]
    assert sets.num_exchanged(mask, magnitude, 0.5, 0.9).tolist() == [1, 1]  # rounded down, as for a matrix
    assert text(exchanged(mask, magnitude, growth, 0.5, 0.0, sets)) == "100 011 101"
    assert text(exchanged(mask, magnitude, growth, 0.5, 0.0, WholeMatrix())) == "110 001 101"  # k gives up both


@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    columns=st.integers(1, 6),
    share=st.floats(0, 1),
    dim=st.sampled_from([0, 1]),
    by_head=st.booleans(),
    seed=st.integers(0, 999),
)
def test_sets_of_rows_are_matrices_of_their_own(
    sizes: list[int], repeats: int, columns: int, share: float, dim: int, by_head: bool, seed: int
) -> None:
    """Counts, exchange and pruning of interleaved rows are those of separate matrices with the same entries."""
    period = sum(sizes)
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    counts = [int(share * size * repeats * columns) for size in sizes]
    interleaved = period if repeats > 1 else None
    rows = [
        RowGroup("q", start, start + size, count, repeats, interleaved)
        for start, size, count in zip(starts, sizes, counts, strict=True)
    ]
    sets = RowSets(dim, tuple(rows), head_size=1 if by_head else None)
    shape = torch.Size((period * repeats, columns))
    stored = shape if dim == 0 else torch.Size(reversed(shape))
    mask, magnitude, growth = (
        sets.first_mask(stored, sum(counts), seed),
        random_scores(stored, seed + 1),
        random_scores(stored, seed + 2),
    )
    changed = exchanged(mask, magnitude, growth, 0.4, 0.3, sets)
    kept = sets.largest(magnitude, mask, sets.count(mask) // 2)
    for group, count in zip(rows, counts, strict=True):
        own = torch.tensor(group.rows)
        one: Groups = EqualGroups(dim, group.num_rows) if by_head else WholeMatrix()
        before, size, grown = (tensor.index_select(dim, own) for tensor in (mask, magnitude, growth))
        assert int(before.sum()) == count
        assert torch.equal(changed.index_select(dim, own), exchanged(before, size, grown, 0.4, 0.3, one))
        assert torch.equal(kept.index_select(dim, own), one.largest(size, before, one.count(before) // 2))


def test_the_first_mask_is_uniform_within_a_set() -> None:
    sets = RowSets(1, (RowGroup("q", 0, 1, 4, 2, 2), RowGroup("k", 1, 2, 8, 2, 2)))
    masks = torch.stack([sets.first_mask(torch.Size((5, 4)), 12, seed) for seed in range(2000)])
    expected = torch.tensor([0.4, 0.8, 0.4, 0.8], dtype=torch.float64).expand(5, 4)
    torch.testing.assert_close(masks.double().mean(0), expected, rtol=0, atol=0.06)
