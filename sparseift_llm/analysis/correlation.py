"""Pearson and Spearman correlation of two quantities across runs, with p-values and intervals, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

MIN_RUNS = 3
LEVEL = 0.95
_EXACT_RUNS = 7  # up to here Spearman's p-value counts all 7! = 5,040 orders


@dataclass(frozen=True)
class Correlation:
    """How two quantities go together across runs.

    Args:
        first, second: their names.
        num_runs: runs that have both.
        pearson, spearman: coefficients in [-1, 1].
        pearson_p, spearman_p: two-sided p-values: of Student's t, Spearman's up to 7 runs exact by counting all orders.
        pearson_interval, spearman_interval: at 95%, by Fisher's transform (Spearman: Bonett and Wright 2000); None for
            3 runs and for a coefficient of 1 or -1, where it is not defined.
        excluded: why all others are None, or None.
    """

    first: str
    second: str
    num_runs: int
    pearson: float | None = None
    pearson_p: float | None = None
    pearson_interval: tuple[float, float] | None = None
    spearman: float | None = None
    spearman_p: float | None = None
    spearman_interval: tuple[float, float] | None = None
    excluded: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `analysis.json` holds of this pair."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def correlate(first: str, second: str, pairs: Sequence[tuple[float, float]]) -> Correlation:
    """Correlate two quantities.

    Args:
        first, second: their names.
        pairs: finite values of both, one pair for each run.

    Returns:
        The coefficients; none, but a reason, with fewer than 3 runs or where a quantity does not vary.
    """
    if len(pairs) < MIN_RUNS:
        reason = f"correlations need at least {MIN_RUNS} runs, got {len(pairs)}"
        return Correlation(first, second, len(pairs), excluded=reason)
    x, y = np.array(pairs, dtype=np.float64).T
    for name, values in ((first, x), (second, y)):
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return Correlation(first, second, len(pairs), excluded=f"{name} is the same in all runs")
    pearson = stats.pearsonr(x, y)
    r, rank = float(pearson.statistic), float(stats.spearmanr(x, y).statistic)
    p = exact_spearman_p(x, y) if len(x) <= _EXACT_RUNS else float(stats.spearmanr(x, y).pvalue)
    return Correlation(
        first, second, len(pairs),
        r, float(pearson.pvalue), _interval(r, len(x), 1.0),
        rank, p, _interval(rank, len(x), 1 + rank**2 / 2),
    )  # fmt: skip


def exact_spearman_p(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """The share of all orders of `x` whose rank correlation with `y` is at least as large in magnitude."""
    ranks, others = stats.rankdata(x), stats.rankdata(y)
    centred = others - others.mean()

    def statistic(order: np.ndarray, axis: int) -> Any:
        return np.abs((order * centred).sum(axis))

    test = stats.permutation_test(
        (ranks,), statistic, permutation_type="pairings", vectorized=True, n_resamples=np.inf, alternative="greater"
    )
    return float(test.pvalue)


def _interval(r: float, num_runs: int, variance: float) -> tuple[float, float] | None:
    """Fisher's interval with standard error sqrt(variance / (n - 3))."""
    if num_runs <= 3 or 1 - abs(r) < 1e-12:
        return None
    z, half = math.atanh(r), float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance / (num_runs - 3))
    return math.tanh(z - half), math.tanh(z + half)
