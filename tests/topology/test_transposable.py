"""Masks that are n:m along both sides: their patterns, first masks, and exchanges held to lists of all patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_llm.topology import transposable
from sparseift_llm.topology.exchange import drop_and_grow
from sparseift_llm.topology.masks import random_scores
from sparseift_llm.topology.transposable import TransposableBlocks, block_patterns
from tests.helpers.patterns import by_hand_in_blocks, is_patterned
from tests.helpers.tiny_runs import bits

NUM_PATTERNS = {(1, 2): 2, (1, 3): 6, (2, 3): 6, (1, 4): 24, (2, 4): 90, (3, 4): 24}
TWO_OF_FOUR = TransposableBlocks(2, 4)


def exchanged(
    mask: Tensor, importance: Tensor, growth: Tensor, fraction: float, groups: TransposableBlocks, **more: Any
) -> Tensor:
    return drop_and_grow(
        mask, importance, growth, groups.num_exchanged(mask, importance, fraction, 0.5), groups, **more
    )


@pytest.mark.parametrize(("pattern", "number"), NUM_PATTERNS.items())
def test_all_patterns_are_there_once(pattern: tuple[int, int], number: int) -> None:
    """By trying all masks of m x m."""
    n, m = pattern
    codes = torch.arange(1 << m * m)
    everything = (codes[:, None] >> torch.arange(m * m) & 1).view(-1, m, m)
    found = everything[(everything.sum(1) == n).all(1) & (everything.sum(2) == n).all(1)]
    patterns = block_patterns(n, m)
    assert len(patterns) == len(found) == number
    assert {tuple(mask.flatten().tolist()) for mask in patterns.int()} == {tuple(m.flatten().tolist()) for m in found}


def test_an_exchange_by_hand() -> None:
    """The two smallest weights are opposite corners of a square, of which the other corners are free."""
    mask = bits("1001 0110 0110 1001")
    size = torch.tensor([[1.0, 0, 0, 9], [0, 2, 9, 0], [0, 9, 9, 0], [9, 0, 0, 9]])
    growth = torch.tensor([[1.0, 7, 0, 5], [6, 2, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]])
    assert TWO_OF_FOUR.num_exchanged(mask, size, 0.25, 0.5).tolist() == [2]
    assert torch.equal(exchanged(mask, size, growth, 0.25, TWO_OF_FOUR), bits("0101 1010 0110 1001"))  # 7 + 6 > 1 + 2
    growth[0, 0] = 11.5
    assert torch.equal(exchanged(mask, size, growth, 0.25, TWO_OF_FOUR), mask)  # 7 + 6 < 11.5 + 2
    growth[0, 0] = 0
    assert torch.equal(exchanged(mask, size, growth, 0.125, TWO_OF_FOUR), mask)  # of one weight there is no other place
    growth[0, 1] = 0  # and with keep_connected nothing grows for a score of 0, whatever the other one is
    growth[1, 1] = 0
    assert torch.equal(exchanged(mask, size, growth, 0.25, TWO_OF_FOUR), bits("0101 1010 0110 1001"))
    assert torch.equal(exchanged(mask, size, growth, 0.25, TWO_OF_FOUR, connected=()), mask)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    pattern=st.sampled_from(list(NUM_PATTERNS)),
    shape=shapes,
    fraction=st.floats(0, 1),
    levels=st.sampled_from([2, 1000]),
    only_moving=st.booleans(),
    seed=st.integers(0, 999),
)
def test_an_exchange_is_that_of_the_lists(
    pattern: tuple[int, int],
    shape: tuple[int, int],
    fraction: float,
    levels: int,
    only_moving: bool,
    seed: int,
) -> None:
    """Scores are whole numbers, so that sums are exact: few of them, with many ties and zeros, or many."""
    n, m = pattern
    groups, size = TransposableBlocks(n, m), torch.Size((shape[0] * m, shape[1] * m))
    mask = groups.first_mask(size, size.numel() * n // m, seed)
    importance, growth = [(levels * random_scores(size, seed + i)).round().float() for i in (1, 2)]
    number = int(fraction * int(mask.sum()))
    changed = exchanged(mask, importance, growth, fraction, groups, connected=() if only_moving else None)
    assert is_patterned(mask, n, m)
    assert is_patterned(changed, n, m)
    assert torch.equal(changed, by_hand_in_blocks(mask, importance, growth, number, n, m, only_moving))
    smallest = importance[mask].sort().values[:number]
    assert not (mask & ~changed & (importance > smallest.max() if number else True)).any()
    if only_moving:
        assert (growth[changed & ~mask] > 0).all()


def test_a_rule_that_lets_others_go_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison must catch: the pattern of largest growth, whatever has to go for it."""
    groups, size = TWO_OF_FOUR, torch.Size((16, 16))
    mask = groups.first_mask(size, 128, 0)
    importance, growth = random_scores(size, 1), random_scores(size, 2)
    expected = by_hand_in_blocks(mask, importance, growth, 64, 2, 4)
    assert torch.equal(exchanged(mask, importance, growth, 0.5, groups), expected)
    best = TransposableBlocks.best
    monkeypatch.setattr(TransposableBlocks, "best", lambda self, scores, kept: best(self, scores))
    changed = exchanged(mask, importance, growth, 0.5, groups)
    assert is_patterned(changed, 2, 4)
    assert not torch.equal(changed, expected)


def test_a_matrix_is_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(torch.Size((20, 24)), 0)
    whole = TWO_OF_FOUR.best(scores)
    monkeypatch.setattr(transposable, "_BLOCKS_AT_ONCE", 7)
    assert torch.equal(TWO_OF_FOUR.best(scores), whole)


def test_first_masks_are_uniform_over_the_patterns() -> None:
    """90,000 blocks: each of the 90 patterns comes a thousand times, to six standard deviations."""
    shape = torch.Size((1200, 1200))
    mask = TWO_OF_FOUR.first_mask(shape, shape.numel() // 2, 5)
    assert is_patterned(mask, 2, 4)
    blocks = mask.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).reshape(-1, 16)
    _, counts = (blocks.long() << torch.arange(16)).sum(1).unique(return_counts=True)
    assert len(counts) == 90
    assert (counts - 1000).abs().max() < 6 * 1000**0.5
    assert torch.equal(mask, TWO_OF_FOUR.first_mask(shape, shape.numel() // 2, 5))
    assert not torch.equal(mask, TWO_OF_FOUR.first_mask(shape, shape.numel() // 2, 6))


def test_how_many_weights_change_places() -> None:
    """A part of what is dropped: at 30% a tenth of all, and at 50% almost a quarter; the guide says so."""
    size = torch.Size((256, 256))
    mask = TWO_OF_FOUR.first_mask(size, size.numel() // 2, 0)
    shares = []
    for fraction in (0.1, 0.3, 0.5):
        changed = exchanged(mask, random_scores(size, 1), random_scores(size, 2), fraction, TWO_OF_FOUR)
        shares.append(float((mask & ~changed).sum() / mask.sum()))
    assert shares == pytest.approx([0.014, 0.104, 0.227], abs=0.006)
