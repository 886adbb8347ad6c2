"""Masks that leave no input unread and no output unfed: by hand, against plain Python, and in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm import DSTConfig, SparseIFTConfig, SparseTrainingController, sparsify
from sparseift_llm.layers.base import sparse_layers
from sparseift_llm.topology.blocks import random_columns, tile_mask
from sparseift_llm.topology.connected import reconnect
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.groups import EqualGroups, Groups, WholeMatrix
from sparseift_llm.topology.masks import random_scores
from tests.helpers.decoders import decoder
from tests.helpers.models import token_ids
from tests.helpers.tiny_runs import bits


def text(mask: Tensor) -> str:
    return " ".join("".join("1" if active else "0" for active in row) for row in mask.tolist())


# ---- the exchange


MAGNITUDE = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 4.0, 0.0]])
MASK = bits("1100 0110")
ROWS = EqualGroups(0, 2)


@pytest.mark.parametrize(
    ("growth", "number", "expected", "of_the_reference"),
    [
        # column 0 has the unit of size 1 alone, so that 2 goes in its place
        ([[0, 0, 9, 8], [8, 0, 0, 9]], [1, 0], "1010 0110", "0110 0110"),
        # then 3 is the last of column 1, and 4 that of column 2: the second row can give nothing up
        ([[0, 0, 9, 8], [8, 0, 0, 9]], [1, 1], "1010 0110", "0110 0011"),
        # nothing has a growth score: 2, or what else would have been dropped, stays
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [1, 1], "1100 0110", "1100 1010"),
        # 3 stays in place of the unit in column 0, which is the first of those that have no growth score
        ([[0, 0, 0, 0], [0, 0, 0, 0]], [0, 1], "1100 0110", "1100 1010"),
        # one unit has: of the two that would go, the larger stays
        ([[0, 0, 0, 5], [0, 0, 0, 0]], [2, 0], "1001 0110", "1001 0110"),
    ],
)
def test_by_hand(growth: list[list[int]], number: list[int], expected: str, of_the_reference: str) -> None:
    scores, numbers = torch.tensor(growth, dtype=torch.float32), torch.tensor(number)
    assert text(drop_and_grow(MASK, MAGNITUDE, scores, numbers, ROWS, (0,))) == expected
    assert text(drop_and_grow(MASK, MAGNITUDE, scores, numbers, ROWS)) == of_the_reference


def check(mask: Tensor, new: Tensor, growth: Tensor, groups: Groups, dims: tuple[int, ...]) -> None:
    assert torch.equal(groups.count(new), groups.count(mask))
    for dim in dims:
        assert bool((new.any(dim) | ~mask.any(dim)).all())  # no line has lost its last unit
    assert bool((growth[new & ~mask] > 0).all())


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 7), by_row=st.booleans(), both=st.booleans(),
    few=st.booleans(), seed=st.integers(0, 9999),
)  # fmt: skip
def test_no_line_is_lost_and_nothing_is_grown_for_nothing(
    rows: int, columns: int, by_row: bool, both: bool, few: bool, seed: int
) -> None:
    shape, groups = torch.Size((rows, columns)), EqualGroups(0, rows) if by_row else WholeMatrix()
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        highest = 2 if few else 1000
        return torch.randint(0, highest, (rows, columns), generator=generator).double()

    mask = torch.rand(shape, generator=generator) < 0.5
    magnitude, growth = drawn() * mask, drawn()
    number = (groups.count(mask) * torch.rand(len(groups.count(mask)), generator=generator)).long()
    dims = (0, 1) if both else (0,)
    new = drop_and_grow(mask, magnitude, growth, number, groups, dims)
    check(mask, new, growth, groups, dims)
    assert bool((groups.count(mask & ~new) <= number).all())
    free = drop_and_grow(mask, magnitude, growth + 1, number, groups, ())  # neither rule has anything to do
    assert torch.equal(free, drop_and_grow(mask, magnitude, growth + 1, number, groups))


def test_the_check_catches_the_rule_of_the_reference() -> None:
    growth = torch.tensor([[0.0, 0.0, 9.0, 8.0], [8.0, 0.0, 0.0, 9.0]])
    check(MASK, drop_and_grow(MASK, MAGNITUDE, growth, torch.tensor([1, 0]), ROWS, (0,)), growth, ROWS, (0,))
    for wrong in (growth, torch.zeros(2, 4)):
        with pytest.raises(AssertionError):
            check(MASK, drop_and_grow(MASK, MAGNITUDE, wrong, torch.tensor([1, 1]), ROWS), wrong, ROWS, (0,))


# ---- first masks


def test_a_unit_moves_into_an_empty_column_by_hand() -> None:
    """Column 2 is empty; in it row 1 has the larger score, and its unit in column 1, which row 0 shares, may go."""
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.2]])
    assert text(reconnect(bits("110 010"), scores, ROWS, (0,))) == "110 001"
    assert text(reconnect(bits("110 000"), scores, ROWS, (0,))) == "110 000"  # the numbers do not allow it


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_no_column_of_tiles_is_empty_where_there_are_enough(rows: int, columns: int, share: float, seed: int) -> None:
    number = rows + int(share * (rows * columns - rows))
    mask = tile_mask(random_columns(rows, columns, number, seed, connected=True), rows, columns)
    before = tile_mask(random_columns(rows, columns, number, seed), rows, columns)
    assert torch.equal(mask.sum(1), before.sum(1))
    assert int(mask.any(0).sum()) == min(columns, number)
    if before.any(0).all():
        assert torch.equal(mask, before)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_single_weights_keep_their_number_and_lose_no_line(rows: int, columns: int, share: float, seed: int) -> None:
    shape, groups = torch.Size((rows, columns)), WholeMatrix()
    before = groups.first_mask(shape, int(share * rows * columns), seed)
    mask = reconnect(before, random_scores(shape, seed), groups, (0, 1))
    assert int(mask.sum()) == int(before.sum())
    for dim in (0, 1):
        assert int(mask.any(dim).sum()) >= int(before.any(dim).sum())
    if int(mask.sum()) >= rows + columns:
        assert mask.any(0).all()
        assert mask.any(1).all()


# ---- models


def trained(structure: str, keep: bool | None, **options: Any) -> tuple[int, int]:
    """Empty rows and columns of all masks, before and after ten updates of RigL that each drop a half."""
    dst = DSTConfig("rigl", update_every_steps=1, drop_fraction=0.5, stop_fraction=1.0, keep_connected=keep)
    model = sparsify(decoder("gpt2"), SparseIFTConfig(structure=structure, dst=dst, sparsity=0.9, **options))

    def num_empty() -> int:
        masks = [layer.current_mask() for layer in sparse_layers(model).values()]
        return sum(int((~mask.any(dim)).sum()) for mask in masks for dim in (0, 1))

    before = num_empty()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SparseTrainingController(model, optimizer, total_steps=20)
    for seed in range(10):
        model(input_ids=token_ids(seed=seed), labels=token_ids(seed=seed), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, num_empty()


@pytest.mark.support("keep_connected: no input unread, no output unfed", proves=("block",))
def test_tiles_leave_nothing_unread_by_default() -> None:
    assert trained("block", None, block_size=8) == (0, 0)
    before, after = trained("block", False, block_size=8)
    assert min(before, after) > 0


@pytest.mark.support("keep_connected: no input unread, no output unfed", proves=("unstructured",))
def test_single_weights_do_so_on_request() -> None:
    assert trained("unstructured", True, width_multiple=32) == (0, 0)
    assert trained("unstructured", None, width_multiple=32)[1] > 0


def test_gmp_cannot() -> None:
    with pytest.raises(ValueError, match="prunes the smallest weights wherever they are, so keep_connected cannot"):
        DSTConfig("gmp", keep_connected=True)
    assert not SparseIFTConfig().dst.keeps_connected("unstructured")
    assert SparseIFTConfig().dst.keeps_connected("block")
