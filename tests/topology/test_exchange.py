"""The exchange of SET and RigL: golden masks of the reference's rule, and slow references in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.topology import groups, masks
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.groups import EqualGroups, WholeMatrix
from tests.helpers.tiny_runs import bits


def flat_bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


def flat(mask: Tensor) -> str:
    assert mask.dtype == torch.bool
    return "".join("1" if active else "0" for active in mask.flatten().tolist())


def text(mask: Tensor) -> str:
    return " ".join(map(flat, mask))


def whole(mask: Tensor, magnitude: Tensor, growth: Tensor, num_changed: int) -> Tensor:
    return drop_and_grow(mask, magnitude, growth, torch.tensor([num_changed]), WholeMatrix())


def pruned(mask: Tensor, magnitude: Tensor, num_active: int) -> Tensor:
    return WholeMatrix().largest(magnitude, mask, torch.tensor([num_active]))


# ---- one group: the rule of the reference


WHOLE_MAGNITUDE = torch.tensor([5.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0, 4.0])
WHOLE_MASK = flat_bits("11010101")


@pytest.mark.parametrize(
    ("growth", "num_changed", "expected"),
    [
        ([9, 9, 9, 9, 9, 9, 9, 9], 0, "11010101"),
        ([9, 0, 1, 9, 3, 9, 2, 9], 1, "10011101"),  # drops 1, grows 4
        ([9, 0, 1, 9, 3, 9, 2, 9], 2, "10011101"),  # drops 1 and 5, regrows 5, grows 4
        ([9, 0, 1, 0, 3, 0, 2, 9], 2, "10011011"),  # drops 1 and 5, grows 4 and 6
        ([0, 8, 1, 0, 3, 0, 2, 0], 1, "11010101"),  # drops 1 and regrows it
        ([0, 8, 1, 0, 3, 0, 2, 0], 2, "11011001"),  # drops 1 and 5, regrows 1, grows 4
        ([0, 0, 0, 0, 0, 0, 0, 0], 2, "11110001"),  # ties: of 1, 2, 4, 5, 6 the first two
        ([0, 1, 7, 1, 7, 1, 7, 1], 3, "10101011"),  # drops 1, 3, 5, grows 2, 4, 6
        ([1, 2, 3, 4, 5, 6, 7, 8], 5, "00011111"),  # drops all five, grows the five largest
    ],
)
def test_drop_and_grow(growth: list[int], num_changed: int, expected: str) -> None:
    assert flat(whole(WHOLE_MASK, WHOLE_MAGNITUDE, torch.tensor(growth, dtype=torch.float32), num_changed)) == expected


def test_equal_magnitudes_drop_the_lower_index() -> None:
    growth = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    assert flat(whole(flat_bits("11110000"), torch.ones(8), growth, 2)) == "00110011"


def test_drop_and_grow_leaves_the_mask_alone() -> None:
    whole(WHOLE_MASK, WHOLE_MAGNITUDE, -WHOLE_MAGNITUDE, 3)
    assert flat(WHOLE_MASK) == "11010101"


def slow_drop_and_grow(mask: list[bool], magnitude: list[int], growth: list[int], num_changed: int) -> list[bool]:
    active = [index for index, is_active in enumerate(mask) if is_active]
    dropped = sorted(active, key=lambda index: (magnitude[index], index))[:num_changed]
    kept = set(active) - set(dropped)
    inactive = [index for index in range(len(mask)) if index not in kept]
    grown = sorted(inactive, key=lambda index: (-growth[index], index))[:num_changed]
    return [index in kept or index in grown for index in range(len(mask))]


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), dtype=st.sampled_from([32, 64]), data=st.data())
def test_drop_and_grow_equals_the_slow_reference(rows: int, columns: int, dtype: int, data: st.DataObject) -> None:
    size = rows * columns
    few = st.lists(st.integers(0, 3), min_size=size, max_size=size)  # four values: many ties
    many = st.lists(st.integers(0, 1000), min_size=size, max_size=size)
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    magnitude, growth = data.draw(few | many), data.draw(few | many)
    num_changed = data.draw(st.integers(0, sum(mask)))
    float_type = {32: torch.float32, 64: torch.float64}[dtype]

    def shaped(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=float_type).view(rows, columns)

    result = whole(torch.tensor(mask).view(rows, columns), shaped(magnitude), shaped(growth), num_changed)
    assert result.shape == (rows, columns)
    assert result.flatten().tolist() == slow_drop_and_grow(mask, magnitude, growth, num_changed)
    assert int(result.sum()) == sum(mask)


# ---- magnitude pruning


@pytest.mark.parametrize(
    ("num_active", "expected"), [(5, "11010101"), (4, "10010101"), (2, "10000001"), (1, "10000000"), (0, "00000000")]
)
def test_magnitude_pruning(num_active: int, expected: str) -> None:
    assert flat(pruned(WHOLE_MASK, WHOLE_MAGNITUDE, num_active)) == expected


def test_magnitude_mask_never_takes_an_inactive_weight() -> None:
    magnitude = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0, 9.0])
    assert flat(pruned(flat_bits("10101010"), magnitude, 3)) == "00101010"


def test_magnitude_mask_with_equal_weights_keeps_the_lower_index() -> None:
    assert flat(pruned(flat_bits("01111110"), torch.ones(8), 2)) == "01100000"


@given(size=st.integers(1, 40), data=st.data())
def test_repeated_pruning_is_nested_and_exact(size: int, data: st.DataObject) -> None:
    magnitude = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))).float()
    first = data.draw(st.integers(0, size))
    second = data.draw(st.integers(0, first))
    wide = pruned(torch.ones(size, dtype=torch.bool), magnitude, first)
    narrow = pruned(wide, magnitude, second)
    assert (int(wide.sum()), int(narrow.sum())) == (first, second)
    assert not bool((narrow & ~wide).any())
    assert torch.equal(narrow, pruned(torch.ones(size, dtype=torch.bool), magnitude, second))


# ---- block-rows: each row keeps its number


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
def test_rows_by_hand(growth: list[list[int]], num_changed: list[int], expected: str) -> None:
    scores = torch.tensor(growth, dtype=torch.float32)
    assert text(drop_and_grow(MASK, MAGNITUDE, scores, torch.tensor(num_changed), EqualGroups(0, 3))) == expected
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
    result = drop_and_grow(mask, magnitude, growth, torch.tensor(num_changed), EqualGroups(0, len(mask)))
    arguments = zip(mask.tolist(), magnitude.tolist(), growth.tolist(), num_changed, strict=True)
    assert result.tolist() == [slow_row(*row) for row in arguments]
    assert torch.equal(result.sum(1), mask.sum(1))


@given(rows=st.integers(1, 6), columns=st.integers(1, 9), dtype=st.sampled_from([32, 64]), data=st.data())
def test_rows_equal_the_slow_reference(rows: int, columns: int, dtype: int, data: st.DataObject) -> None:
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


LARGEST = masks.largest_per_row


@pytest.mark.parametrize("fault", [last_of_equals, over_all_rows, also_ineligible])
def test_the_check_of_drop_and_grow_catches_faults(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 3.0]])
    check_drop_and_grow(MASK, MAGNITUDE, growth, [1, 1, 1])
    monkeypatch.setattr(groups, "largest_per_row", fault)
    with pytest.raises(AssertionError):
        check_drop_and_grow(MASK, MAGNITUDE, growth, [1, 1, 1])
