"""Tile masks against values worked out by hand and a slow reference in plain Python, one block-row at a time."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.topology import blocks
from sparseift_llm.topology.blocks import (
    are_valid,
    changes_per_row,
    columns_of,
    drop_and_grow_per_row,
    random_columns,
    reassign,
    row_starts,
    rows_of_slots,
    slots_by_column,
    tile_mask,
    tile_sums,
)
from sparseift_llm.topology.masks import derive_seed, random_phase
from tests.helpers.tiny_runs import bits


def text(mask: Tensor) -> str:
    assert mask.dtype == torch.bool
    return " ".join("".join("1" if active else "0" for active in row) for row in mask.tolist())


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def tilings(draw: st.DrawFn, lowest: int = 0) -> tuple[int, int, int]:
    """Rows, columns and a number of tiles, at least `lowest` in each row."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return rows, columns, draw(st.integers(min(lowest, columns) * rows, rows * columns))


seeds = st.integers(0, 2**31)


# ---- slots and rows


@pytest.mark.parametrize(
    ("num_tiles", "num_rows", "starts", "rows"),
    [
        (5, 3, [0, 1, 3, 5], [0, 1, 1, 2, 2]),
        (6, 3, [0, 2, 4, 6], [0, 0, 1, 1, 2, 2]),
        (7, 4, [0, 1, 3, 5, 7], [0, 1, 1, 2, 2, 3, 3]),
        (2, 4, [0, 0, 1, 1, 2], [1, 3]),
        (3, 1, [0, 3], [0, 0, 0]),
        (0, 2, [0, 0, 0], []),
    ],
)
def test_slots_of_each_row_by_hand(num_tiles: int, num_rows: int, starts: list[int], rows: list[int]) -> None:
    assert row_starts(num_tiles, num_rows).tolist() == starts
    assert rows_of_slots(num_tiles, num_rows).tolist() == rows
    assert row_starts(num_tiles, num_rows).dtype == torch.int32


@given(st.integers(0, 3000), st.integers(1, 300))
def test_rows_differ_by_at_most_one_tile(num_tiles: int, num_rows: int) -> None:
    starts, rows = row_starts(num_tiles, num_rows), rows_of_slots(num_tiles, num_rows)
    counts = starts.diff()
    assert (int(starts[0]), int(starts[-1])) == (0, num_tiles)
    assert int(counts.max()) - int(counts.min()) <= 1
    assert torch.equal(rows, torch.arange(num_rows).repeat_interleave(counts))


def test_slots_by_column_by_hand() -> None:
    # slots 1 and 4 hold column 0, slot 2 column 1, none column 2, slots 0, 3 and 5 column 3
    order, starts = slots_by_column(int32(3, 0, 1, 3, 0, 3), 4)
    assert order.tolist() == [1, 4, 2, 0, 3, 5]
    assert starts.tolist() == [0, 2, 3, 3, 6]
    assert (order.dtype, starts.dtype) == (torch.int32, torch.int32)


@given(tilings(), seeds)
def test_slots_by_column_finds_every_tile_of_a_column(tiling: tuple[int, int, int], seed: int) -> None:
    rows, columns, num_tiles = tiling
    held = random_columns(rows, columns, num_tiles, seed)
    order, starts = slots_by_column(held, columns)
    assert len(starts) == columns + 1
    for column in range(columns):
        slots = order[starts[column] : starts[column + 1]].tolist()
        assert slots == [slot for slot, at in enumerate(held.tolist()) if at == column]


def test_slots_by_column_of_no_tiles_and_of_meta_tiles() -> None:
    order, starts = slots_by_column(int32(), 3)
    assert (order.tolist(), starts.tolist()) == ([], [0, 0, 0, 0])
    order, starts = slots_by_column(torch.empty(5, dtype=torch.int32, device="meta"), 3)
    assert (order.shape, starts.shape) == ((5,), (4,))
    assert (order.dtype, starts.dtype) == (torch.int32, torch.int32)


# ---- columns and masks


def test_columns_and_mask_by_hand() -> None:
    mask = bits("0100 1010 0011")  # 5 tiles in 3 rows: 1, 2, 2
    assert columns_of(mask).tolist() == [1, 0, 2, 2, 3]
    assert text(tile_mask(int32(1, 2, 0, 3, 2), 3, 4)) == "0100 1010 0011"  # slots of a row in any order


@given(tilings(), seeds)
def test_random_columns(tiling: tuple[int, int, int], seed: int) -> None:
    rows, columns, num_tiles = tiling
    held = random_columns(rows, columns, num_tiles, seed)
    assert held.dtype == torch.int32
    assert are_valid(held, rows, columns)
    mask = tile_mask(held, rows, columns)
    assert torch.equal(mask.sum(1), row_starts(num_tiles, rows).diff().long())
    assert torch.equal(columns_of(mask), held)  # ascending within a row
    assert torch.equal(held, random_columns(rows, columns, num_tiles, seed))


def test_random_columns_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), random_columns(20, 20, 100, derive_seed(0, "initial mask", 3))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, random_columns(20, 20, 100, derive_seed(0, "initial mask", 3)))
    assert not torch.equal(first, random_columns(20, 20, 100, derive_seed(0, "initial mask", 4)))


def test_random_columns_are_uniform() -> None:
    times = sum(tile_mask(random_columns(4, 10, 12, derive_seed(seed)), 4, 10).int() for seed in range(1000))
    assert isinstance(times, Tensor)
    # binomial: mean 300, standard deviation sqrt(1000 * 0.3 * 0.7) = 14.5
    assert int((times - 300).abs().max()) < 5 * 14.5


@pytest.mark.parametrize(
    ("columns", "valid"),
    [
        ([2, 0, 1, 2, 3], True),
        ([2, 0, 1, 3, 2], True),
        ([2, 1, 1, 2, 3], False),  # twice column 1 in the second row
        ([2, 0, 1, 2, 2], False),
        ([2, 2, 0, 2, 0], True),  # twice, but in different rows
        ([-1, 0, 1, 2, 3], False),
        ([2, 0, 1, 2, 4], False),
        ([2, 0, 1, 2, 1 << 30], False),
    ],
)
def test_validity_of_columns(columns: list[int], valid: bool) -> None:
    assert are_valid(int32(*columns), 3, 4) == valid


def test_tile_sums_by_hand() -> None:
    matrix = torch.tensor([[1.0, -1.0, 0.0, 2.0], [2.0, -3.0, 0.0, 0.0], [0.0, 0.0, -5.0, 5.0], [0.5, 0.0, 0.0, 0.0]])
    assert tile_sums(matrix, 2).tolist() == [[7.0, 2.0], [0.5, 10.0]]


# ---- reassigning slots


def test_reassign_by_hand() -> None:
    columns, mask = int32(1, 2, 0, 3, 2), bits("0100 1010 0011")
    # row 0 exchanges 1 for 3; row 1 keeps both; row 2 exchanges 3 for 0
    result, changed = reassign(columns, mask, bits("0001 1010 1010"))
    assert result.tolist() == [3, 2, 0, 0, 2]
    assert changed.tolist() == [True, False, False, True, False]
    assert columns.tolist() == [1, 2, 0, 3, 2]
    assert text(mask) == "0100 1010 0011"


def test_reassign_several_in_a_row_by_hand() -> None:
    # columns 4, 1, 3 of one row; 4 and 3 go, 0 and 2 come, in ascending order of slot and of column
    result, changed = reassign(int32(4, 1, 3), bits("01011"), bits("11100"))
    assert result.tolist() == [0, 1, 2]
    assert changed.tolist() == [True, False, True]


def check_reassign(columns: Tensor, num_columns: int, new_mask: Tensor) -> None:
    num_rows = len(new_mask)
    mask = tile_mask(columns, num_rows, num_columns)
    result, changed = reassign(columns, mask, new_mask)
    assert result.dtype == torch.int32
    assert are_valid(result, num_rows, num_columns)
    assert torch.equal(tile_mask(result, num_rows, num_columns), new_mask)
    assert torch.equal(changed, result != columns)  # a slot that keeps its tile keeps its place
    assert int(changed.sum()) == int((mask & ~new_mask).sum())


def shuffled_within_rows(columns: Tensor, num_rows: int, seed: int) -> Tensor:
    """The same tiles in other slots, as after many updates."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(columns), generator=generator)
    return columns[order[rows_of_slots(len(columns), num_rows)[order].argsort(stable=True)]]


@given(tilings(), seeds, seeds, seeds)
def test_reassign_keeps_all_other_slots(tiling: tuple[int, int, int], seed: int, other: int, shuffle: int) -> None:
    rows, columns, num_tiles = tiling
    held = shuffled_within_rows(random_columns(rows, columns, num_tiles, seed), rows, shuffle)
    check_reassign(held, columns, tile_mask(random_columns(rows, columns, num_tiles, other), rows, columns))


def sorted_again(columns: Tensor, mask: Tensor, new_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A fault: the right mask, but every slot is given its tile anew."""
    result = columns_of(new_mask)
    return result, result != columns


def one_row_late(columns: Tensor, mask: Tensor, new_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A fault: grown tiles are handed out from the last row to the first."""
    changed = ~new_mask[rows_of_slots(len(columns), len(mask)), columns.long()]
    result = columns.clone()
    result[changed] = columns_of(new_mask & ~mask).flip(0)
    return result, changed


@pytest.mark.parametrize("fault", [sorted_again, one_row_late])
def test_the_check_of_reassign_catches_faults(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    held, new_mask = int32(3, 0, 1, 2), bits("0101 1010")
    check_reassign(held, 4, new_mask)
    monkeypatch.setattr("tests.topology.test_blocks.reassign", fault)
    with pytest.raises(AssertionError):
        check_reassign(held, 4, new_mask)


# ---- drop and grow


MAGNITUDE = torch.tensor([[5.0, 1.0, 0.0, 3.0], [0.0, 2.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
MASK = bits("1101 0110 1000")


@pytest.mark.parametrize(
    ("growth", "num_changed", "expected"),
    [
        ([[9, 9, 9, 9]] * 3, [0, 0, 0], "1101 0110 1000"),
        ([[0, 0, 1, 0]] * 3, [1, 0, 0], "1011 0110 1000"),  # drops 1, grows 2
        ([[0, 8, 1, 0]] * 3, [1, 0, 0], "1101 0110 1000"),  # drops 1, which comes back
        ([[1, 0, 0, 2]] * 3, [0, 1, 0], "1101 0011 1000"),  # of equal ones drops the first, grows 3
        ([[1, 0, 0, 1]] * 3, [0, 1, 0], "1101 1010 1000"),  # of equal ones grows the first
        ([[0, 0, 0, 0]] * 3, [1, 1, 1], "1101 1010 1000"),  # row 0: 1 and 2 tie, row 2: all do
        ([[0, 1, 2, 0], [3, 0, 0, 4], [0, 6, 7, 5]], [1, 2, 1], "1011 1001 0010"),
        ([[0, 1, 2, 0], [3, 0, 0, 4], [0, 6, 7, 5]], [9, 9, 9], "1110 1001 0010"),  # all that a row holds
    ],
)
def test_drop_and_grow_by_hand(growth: list[list[int]], num_changed: list[int], expected: str) -> None:
    scores = torch.tensor(growth, dtype=torch.float32)
    assert text(drop_and_grow_per_row(MASK, MAGNITUDE, scores, torch.tensor(num_changed))) == expected
    assert text(MASK) == "1101 0110 1000"


def slow_row(mask: list[bool], magnitude: list[int], growth: list[int], num_changed: int) -> list[bool]:
    active = [column for column, is_active in enumerate(mask) if is_active]
    num_changed = min(num_changed, len(active))
    dropped = sorted(active, key=lambda column: (magnitude[column], column))[:num_changed]
    kept = set(active) - set(dropped)
    inactive = [column for column in range(len(mask)) if column not in kept]
    grown = sorted(inactive, key=lambda column: (-growth[column], column))[:num_changed]
    return [column in kept or column in grown for column in range(len(mask))]


def check_drop_and_grow(mask: Tensor, magnitude: Tensor, growth: Tensor, num_changed: list[int]) -> None:
    result = drop_and_grow_per_row(mask, magnitude, growth, torch.tensor(num_changed))
    arguments = zip(mask.tolist(), magnitude.tolist(), growth.tolist(), num_changed, strict=True)
    assert result.tolist() == [slow_row(*row) for row in arguments]
    assert torch.equal(result.sum(1), mask.sum(1))


@given(rows=st.integers(1, 6), columns=st.integers(1, 9), dtype=st.sampled_from([32, 64]), data=st.data())
def test_drop_and_grow_equals_the_slow_reference(rows: int, columns: int, dtype: int, data: st.DataObject) -> None:
    def drawn(values: st.SearchStrategy[int]) -> Tensor:
        listed = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(listed).view(rows, columns)

    few, many = st.integers(0, 2), st.integers(0, 1000)  # three values: many ties
    float_type = {32: torch.float32, 64: torch.float64}[dtype]
    scores = [drawn(data.draw(st.sampled_from([few, many]))).to(float_type) for _ in range(2)]
    num_changed = data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    check_drop_and_grow(drawn(st.integers(0, 1)).bool(), *scores, num_changed)


def test_infinite_weights_do_not_change_how_many_tiles_a_row_has() -> None:
    """Training that has diverged ends with the trainer's own message, not with one about tiles."""
    magnitude = torch.full((3, 4), torch.inf)
    check_drop_and_grow(MASK, magnitude, MAGNITUDE, [1, 1, 1])


def last_of_equals(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """A fault: among equals the higher index wins."""
    return LARGEST(scores.flip(1), eligible.flip(1), counts).flip(1)


def over_all_rows(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """A fault: the largest of the whole matrix instead of each row's."""
    shape = scores.shape
    return LARGEST(scores.view(1, -1), eligible.view(1, -1), counts.sum().view(1)).view(shape)


def also_ineligible(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """A fault: active and inactive tiles are not told apart."""
    return LARGEST(scores, torch.ones_like(eligible), counts)


LARGEST = blocks.largest_per_row


@pytest.mark.parametrize("fault", [last_of_equals, over_all_rows, also_ineligible])
def test_the_check_of_drop_and_grow_catches_faults(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 3.0]])
    check_drop_and_grow(MASK, MAGNITUDE, growth, [1, 1, 1])
    monkeypatch.setattr(blocks, "largest_per_row", fault)
    with pytest.raises(AssertionError):
        check_drop_and_grow(MASK, MAGNITUDE, growth, [1, 1, 1])


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
    monkeypatch.setattr("tests.topology.test_blocks.changes_per_row", fault)
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
