"""Intervals over seeds and items hold the truth as often as they say; those that resample seeds do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from sparseift_llm.evaluation.intervals import Uncertainty, uncertainty

Floats = NDArray[np.float64]
Models = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
NUM_ITEMS, NUM_RESAMPLES, NUM_TRIALS = 400, 60, 300
SPREAD = 0.03  # standard deviation of a model's true accuracy over seeds
NOMINAL = 0.05  # of misses; in 300 trials its standard error is 0.0126


def same_items(draw: np.random.Generator, seeds: int) -> tuple[Floats, Floats]:
    """Two kinds of models of equal accuracy; an item is easy for all of them or for none."""
    difficulty = draw.random(NUM_ITEMS)
    first, second = ((difficulty < draw.normal(0.4, SPREAD, (seeds, 1))).astype(float) for _ in range(2))
    return first, second


def own_items(draw: np.random.Generator, seeds: int) -> tuple[Floats, Floats]:
    """Each kind of model has items of its own that it finds easy, whatever the seed: more items would cancel them."""
    arms = []
    for _ in range(2):
        rates = 0.5 + draw.normal(0, SPREAD, (seeds, 1)) + draw.choice([-0.45, 0.45], NUM_ITEMS)
        arms.append((draw.random((seeds, NUM_ITEMS)) < rates).astype(float))
    return arms[0], arms[1]


def by_our_method(first: Floats, second: Floats, counts: Floats, is_paired: bool, draw: np.random.Generator) -> bool:
    """Whether the 95% interval misses a true difference of 0."""
    found = uncertainty(
        first.mean(axis=1), second.mean(axis=1), counts @ first.T, counts @ second.T, is_paired, NUM_ITEMS
    )
    return abs(second.mean() - first.mean()) > found.half_width(0.95)


def by_resampled_seeds(
    first: Floats, second: Floats, counts: Floats, is_paired: bool, draw: np.random.Generator
) -> bool:
    """The same of percentiles over resampled seeds and items."""
    seeds = draw.integers(len(first), size=(len(counts), len(first)))
    others = seeds if is_paired else draw.integers(len(second), size=(len(counts), len(second)))
    moved = np.take_along_axis(counts @ second.T, others, 1).mean(axis=1)
    moved -= np.take_along_axis(counts @ first.T, seeds, 1).mean(axis=1)
    low, high = np.percentile(moved, [2.5, 97.5])
    return not low <= 0 <= high


def by_seeds_alone(first: Floats, second: Floats, counts: Floats, is_paired: bool, draw: np.random.Generator) -> bool:
    """The same of a t test over seeds, which takes the items for all there are."""
    test = stats.ttest_rel if is_paired else stats.ttest_ind
    return bool(test(first.mean(axis=1), second.mean(axis=1)).pvalue < 0.05)


def misses(method: Callable[..., bool], models: Models, seeds: int, is_paired: bool) -> float:
    draw = np.random.default_rng([seeds, is_paired])
    shares = np.full(NUM_ITEMS, 1 / NUM_ITEMS)
    count = 0
    for _ in range(NUM_TRIALS):
        first, second = models(draw, seeds)
        counts = draw.multinomial(NUM_ITEMS, shares, size=NUM_RESAMPLES) / NUM_ITEMS
        count += method(first, second, counts, is_paired, draw)
    return count / NUM_TRIALS


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("models", [same_items, own_items])
def test_intervals_hold_the_truth(models: Models, seeds: int, is_paired: bool) -> None:
    assert misses(by_our_method, models, seeds, is_paired) <= NOMINAL + 3 * 0.0126


@pytest.mark.parametrize(("seeds", "at_least"), [(2, 0.25), (3, 0.15), (5, 0.08)])
def test_the_simulation_tells_methods_apart(seeds: int, at_least: float) -> None:
    """Resampling seeds misses far too often; a t test over seeds does where items matter."""
    assert misses(by_resampled_seeds, same_items, seeds, False) > at_least
    if seeds == 5:
        assert misses(by_seeds_alone, own_items, seeds, False) > 0.15


def test_intervals_are_not_wider_than_need_be() -> None:
    """With five seeds the truth is missed now and then."""
    assert misses(by_our_method, same_items, 5, True) > 0.015


def test_the_t_interval_by_hand() -> None:
    """Items that all move together: only the spread of the seeds is left. scipy's own interval is the reference."""
    first, second = np.array([0.40, 0.44, 0.42]), np.array([0.45, 0.46, 0.50])
    still = np.zeros((10, 3))
    found = uncertainty(first, second, first + still, second + still, True, 100)
    expected = stats.ttest_rel(second, first).confidence_interval(0.9)
    assert found.half_width(0.9) == pytest.approx((expected.high - expected.low) / 2)
    found = uncertainty(first, second[:2], first + still, second[:2] + still[:, :2], False, 100)
    expected = stats.ttest_ind(second[:2], first, equal_var=False).confidence_interval(0.9)
    assert found.half_width(0.9) == pytest.approx((expected.high - expected.low) / 2)


def test_one_seed_each_has_the_items_alone() -> None:
    draw = np.random.default_rng(0)
    moved = draw.normal(0, 0.01, (5000, 1))
    zero = np.zeros((5000, 1))
    found = uncertainty(np.array([0.4]), np.array([0.5]), zero, moved, False, 1000)
    assert found.seed_df is None
    assert found.half_width(0.95) == pytest.approx(1.96 * 0.01, rel=0.03)


def test_a_single_seed_is_taken_to_spread_as_the_others() -> None:
    several, one = np.array([0.40, 0.44, 0.42]), np.array([0.5])
    still = np.zeros((10, 3))
    expected = stats.t.ppf(0.975, 2) * several.std(ddof=1) * math.sqrt(1 / 3 + 1)
    for first, second in ((several, one), (one, several)):
        found = uncertainty(first, second, first + still[:, : len(first)], second + still[:, : len(second)], False, 50)
        assert found.half_width(0.95) == pytest.approx(expected)


def test_parts_are_added_in_squares() -> None:
    both = Uncertainty(0.01, 999, 0.02, 2)
    items, seeds = Uncertainty(0.01, 999), Uncertainty(0.0, 999, 0.02, 2)
    assert both.half_width(0.95) == pytest.approx(math.hypot(items.half_width(0.95), seeds.half_width(0.95)))
    assert seeds.half_width(0.95) == pytest.approx(4.302653 * 0.02)
