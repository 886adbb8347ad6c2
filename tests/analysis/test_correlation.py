"""Correlation coefficients against hand-computed values, counted orders and SciPy, and where there are none."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from sparseift_llm.analysis.correlation import correlate, exact_spearman_p


def test_three_runs_by_hand() -> None:
    """x = 1, 2, 3 and y = 1, 3, 2: r = 1/2 on values and on ranks, which all 6 orders reach in magnitude."""
    found = correlate("a", "b", [(1, 1), (2, 3), (3, 2)])
    assert (found.pearson, found.spearman) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.pearson_p == pytest.approx(2 / 3)  # t = 0.577 with one degree of freedom: 1 - 2/pi atan(t)
    assert found.spearman_p == pytest.approx(1.0)
    assert (found.pearson_interval, found.spearman_interval) == (None, None)
    assert found.excluded is None


def test_a_perfect_order_of_three_runs_proves_little() -> None:
    found = correlate("a", "b", [(1, 10), (2, 100), (3, 1000)])
    assert found.spearman == pytest.approx(1.0)
    assert found.spearman_p == pytest.approx(1 / 3)  # two of six orders; Student's t would say 0


@pytest.mark.parametrize("num_runs", [5, 7, 8, 20])
def test_against_scipy(num_runs: int) -> None:
    generator = np.random.default_rng(num_runs)
    x = generator.standard_normal(num_runs)
    y = x + generator.standard_normal(num_runs)
    found = correlate("a", "b", list(zip(x.tolist(), y.tolist(), strict=True)))
    pearson, spearman = stats.pearsonr(x, y), stats.spearmanr(x, y)
    assert (found.pearson, found.pearson_p) == pytest.approx((pearson.statistic, pearson.pvalue))
    assert found.pearson_interval == pytest.approx(tuple(pearson.confidence_interval(0.95)))
    assert found.spearman == pytest.approx(spearman.statistic)
    if num_runs > 7:
        assert found.spearman_p == pytest.approx(spearman.pvalue)
    assert found.spearman_interval is not None
    low, high = found.spearman_interval
    half = 1.959964 * math.sqrt((1 + spearman.statistic**2 / 2) / (num_runs - 3))
    assert (math.atanh(low), math.atanh(high)) == pytest.approx(
        (math.atanh(spearman.statistic) - half, math.atanh(spearman.statistic) + half)
    )
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize("y", [[2, 1, 4, 3, 5], [1, 1, 2, 3, 3], [5, 4, 3, 2, 1]])
def test_the_exact_p_value_counts_orders(y: list[int]) -> None:
    x = [1, 2, 3, 4, 5]
    observed = abs(stats.spearmanr(x, y).statistic)
    orders = [abs(stats.spearmanr(order, y).statistic) for order in itertools.permutations(x)]
    assert exact_spearman_p(x, y) == pytest.approx(np.mean([value >= observed - 1e-9 for value in orders]))


@pytest.mark.parametrize("num_runs", [0, 1, 2])
def test_fewer_than_three_runs_have_no_correlation(num_runs: int) -> None:
    found = correlate("a", "b", [(1.0, 2.0), (2.0, 3.0)][:num_runs])
    assert found.excluded == f"correlations need at least 3 runs, got {num_runs}"
    assert (found.pearson, found.spearman, found.pearson_p, found.spearman_p) == (None,) * 4


@pytest.mark.parametrize("value", [0.0, 3.1])
def test_a_quantity_that_does_not_vary_has_no_correlation(value: float) -> None:
    pairs = [(1.0, value), (2.0, value + 1e-15), (3.0, value)] if value else [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]
    assert correlate("a", "b", pairs).excluded == "b is the same in all runs"
    assert correlate("b", "a", [(y, x) for x, y in pairs]).excluded == "b is the same in all runs"
