"""Tile masks against values worked out by hand and a slow reference in plain Python, one block-row at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.topology.blocks import (
    are_valid,
    by_column,
    columns_of,
    random_columns,
    reassign,
    rows_of_slots,
    tile_mask,
    tile_sums,
)
from sparseift_llm.topology.groups import row_starts
from sparseift_llm.topology.masks import derive_seed
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


def test_by_column_by_hand() -> None:
    # slots 1 and 4 hold column 0, slot 2 column 1, none column 2, slots 0, 3 and 5 column 3
    # and two slots are in each of three block-rows
    slots, rows, starts, heavy_first = tables = by_column(int32(3, 0, 1, 3, 0, 3), 3, 4)
    assert slots.tolist() == [1, 4, 2, 0, 3, 5]
    assert rows.tolist() == [0, 2, 1, 0, 1, 2]
    assert starts.tolist() == [0, 2, 3, 3, 6]
    assert heavy_first.tolist() == [3, 0, 1, 2]
    assert {table.dtype for table in tables} == {torch.int32}


@given(tilings(), seeds)
def test_by_column_finds_every_tile_of_a_column(tiling: tuple[int, int, int], seed: int) -> None:
    rows, columns, num_tiles = tiling
    held = random_columns(rows, columns, num_tiles, seed)
    order, of_row, starts, heavy_first = by_column(held, rows, columns)
    assert torch.equal(of_row, rows_of_slots(num_tiles, rows).int()[order.long()])
    counts = starts.diff()[heavy_first.long()].tolist()
    assert counts == sorted(counts, reverse=True)
    assert sorted(heavy_first.tolist()) == list(range(columns))
    assert len(starts) == columns + 1
    for column in range(columns):
        slots = order[starts[column] : starts[column + 1]].tolist()
        assert slots == [slot for slot, at in enumerate(held.tolist()) if at == column]


def test_by_column_of_no_tiles_and_of_meta_tiles() -> None:
    assert [table.tolist() for table in by_column(int32(), 2, 3)] == [[], [], [0, 0, 0, 0], [0, 1, 2]]
    tables = by_column(torch.empty(5, dtype=torch.int32, device="meta"), 2, 3)
    assert [table.shape for table in tables] == [(5,), (5,), (4,), (3,)]
    assert {table.dtype for table in tables} == {torch.int32}


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
