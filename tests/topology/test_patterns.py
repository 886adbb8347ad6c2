"""Masks of n:m: first ones, and what an exchange drops and grows, worked out by hand and by lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.topology.connected import empty_lines
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.groups import EqualGroups, InputGroups
from sparseift_llm.topology.masks import random_scores
from tests.helpers.patterns import by_hand
from tests.helpers.tiny_runs import bits


def exchanged(
    mask: Tensor, importance: Tensor, growth: Tensor, fraction: float, groups: InputGroups, **more: Any
) -> Tensor:
    return drop_and_grow(
        mask, importance, growth, groups.num_exchanged(mask, importance, fraction, 0.5), groups, **more
    )


def text(mask: Tensor) -> str:
    return " ".join("".join(str(int(bit)) for bit in row) for row in mask)


MASK = bits("11000011 10100101")
SIZE = torch.tensor([[1.0, 9.0, 0, 0, 0, 0, 8.0, 7.0], [2.0, 0, 3.0, 0, 0, 4.0, 0, 6.0]])
GROWTH = torch.tensor([[5.0, 0, 4.0, 6.0, 1.0, 2.0, 0, 0], [7.0, 8.0, 9.0, 6.0, 3.0, 0, 1.0, 0]])


def test_an_exchange_by_hand() -> None:
    """Of eight weights three go: 1, 2 and 3, wherever they are. The first group grows one, and the third two.

    Of these two one is the weight 3, which has the largest growth score of its group, and comes back.
    """
    groups = InputGroups(dim=0, number=4)
    assert groups.num_exchanged(MASK, SIZE, 0.4, 0.5).tolist() == [1, 0, 2, 0]
    assert text(exchanged(MASK, SIZE, GROWTH, 0.4, groups)) == "01010011 01100101"
    assert text(exchanged(MASK, SIZE, GROWTH, 0.2, groups)) == "01010011 10100101"
    transposed = InputGroups(dim=1, number=4)
    assert text(exchanged(MASK.T, SIZE.T, GROWTH.T, 0.4, transposed).T) == "01010011 01100101"
    assert text(by_hand(MASK, SIZE, GROWTH, 3, 4)) == "01010011 01100101"


def test_the_first_mask_by_hand() -> None:
    """Of every three neighbours the one with the largest random number."""
    groups = InputGroups(dim=0, number=4)
    scores = random_scores(torch.Size((2, 6)), 3).tolist()
    expected = [
        [int(row[start + i] == max(row[start : start + 3])) for start in (0, 3) for i in range(3)] for row in scores
    ]
    assert groups.first_mask(torch.Size((2, 6)), 4, 3).int().tolist() == expected


patterns = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5)])


@given(
    pattern=patterns,
    rows=st.integers(1, 5),
    width=st.integers(1, 4),
    fraction=st.floats(0, 1),
    is_transposed=st.booleans(),
    has_ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_an_exchange_is_that_of_the_lists(
    pattern: tuple[int, int], rows: int, width: int, fraction: float, is_transposed: bool, has_ties: bool, seed: int
) -> None:
    n, m = pattern
    shape = torch.Size((rows, width * m))
    groups = InputGroups(int(is_transposed), rows * width)
    stored = torch.Size(reversed(shape)) if is_transposed else shape
    mask = groups.first_mask(stored, rows * width * n, seed)
    importance, growth = random_scores(stored, seed + 1), random_scores(stored, seed + 2)
    if has_ties and not is_transposed:  # which of equals goes first follows the order of storage
        importance, growth = (4 * importance).round(), (4 * growth).round()
    changed = exchanged(mask, importance, growth, fraction, groups)
    views = [tensor.T if is_transposed else tensor for tensor in (mask, importance, growth, changed)]
    assert (views[0].reshape(-1, m).sum(1) == n).all()
    assert (views[3].reshape(-1, m).sum(1) == n).all()
    expected = by_hand(*views[:3], int(fraction * rows * width * n), m)
    assert torch.equal(views[3], expected)


def test_dropping_in_each_group_is_seen() -> None:
    """What the comparison must catch: groups that take turns, as block-rows of tiles do."""
    mask = InputGroups(0, 16).first_mask(torch.Size((4, 16)), 32, 0)
    importance, growth = random_scores(mask.shape, 1), random_scores(mask.shape, 2)
    turns = EqualGroups(0, 16)
    changed = drop_and_grow(mask, importance, growth, turns.num_exchanged(mask, importance, 0.3, 0.5), turns)
    assert (changed.view(-1, 4).sum(1) == 2).all()
    assert not torch.equal(changed, by_hand(mask, importance, growth, 9, 4))


def test_the_first_mask_is_uniform_within_a_group() -> None:
    groups = InputGroups(dim=1, number=4)
    masks = torch.stack([groups.first_mask(torch.Size((8, 2)), 8, seed) for seed in range(2000)])
    torch.testing.assert_close(masks.double().mean(0), torch.full((8, 2), 0.5, dtype=torch.float64), rtol=0, atol=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_keep_connected_drops_no_last_weight_of_a_column(seed: int) -> None:
    """Rows cannot become empty. Of few rows a column can, unless it is asked for that it does not."""
    groups = InputGroups(dim=0, number=12)
    lost: dict[Any, int] = {None: 0, (0, 1): 0}
    for connected in lost:
        mask = groups.first_mask(torch.Size((6, 8)), 24, seed)
        for step in range(20):
            scores = random_scores(mask.shape, 100 * seed + step), random_scores(mask.shape, 100 * seed + step + 50)
            changed = exchanged(mask, *scores, 0.5, groups, connected=connected)
            assert (changed.view(-1, 4).sum(1) == 2).all()
            lost[connected] += int((empty_lines(changed, 0) & ~empty_lines(mask, 0)).sum())
            mask = changed
    assert lost[None] > 0
    assert lost[0, 1] == 0
