"""How far a difference between two kinds of models may be off: over the seeds they were trained with, and over items.

Seeds are few, so their part is a t interval. Resampling seeds would not do: two or three of them hold too little of
the spread, and such an interval misses the truth in a third of all cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Uncertainty:
    """Standard errors of a difference, and what they rest on.

    Args:
        item_error: standard error from the choice of items, beyond what the spread of seeds holds already.
        item_df: degrees of freedom of that, the items of the smallest task less one.
        seed_error: standard error from the training seeds; 0 where they are not known.
        seed_df: degrees of freedom of that; None where there is one seed each.
    """

    item_error: float
    item_df: int
    seed_error: float = 0.0
    seed_df: float | None = None

    def half_width(self, confidence: float) -> float:
        """Half of the interval at this confidence, in (0, 1).

        The two parts are independent, and each has degrees of freedom of its own. The squares of their own half widths
        are added, which is exact if one of them is 0, and wide enough otherwise (Zou and Donner, "Construction of
        confidence limits about effect measures: a general approach", 2008).
        """
        tail = (1 + confidence) / 2
        items = float(stats.t.ppf(tail, max(self.item_df, 1))) * self.item_error
        if self.seed_df is None:
            return items
        return math.hypot(items, float(stats.t.ppf(tail, self.seed_df)) * self.seed_error)


def uncertainty(
    first: Floats, second: Floats, first_samples: Floats, second_samples: Floats, is_paired: bool, num_items: int
) -> Uncertainty:
    """The uncertainty of `mean(second) - mean(first)`.

    With several seeds, the variance of the mean over seeds and items is that of a crossed layout: a part by seeds, a
    part by items that all seeds share, and the rest. The spread of the seeds' values holds the first and the rest; the
    second is what resampled items move all seeds together.

    Args:
        first: (A,) value of each of the first model's seeds.
        second: (B,) of the second's.
        first_samples: (N, A) the same values over N resamples of the items.
        second_samples: (N, B) over the same resamples.
        is_paired: the seeds of both are the same, in order, so that their differences are taken one by one.
        num_items: of the smallest task in it.

    Returns:
        With one seed each, the part of the items alone. If only one model has several seeds, the other is taken to
        spread as it does.
    """
    num_first, num_second = len(first), len(second)
    moved = second_samples.mean(axis=1) - first_samples.mean(axis=1)
    item_df = num_items - 1
    if num_first == num_second == 1:
        return Uncertainty(float(moved.std(ddof=1)), item_df)
    if is_paired:
        differences = second - first
        rest = _rest(second_samples - first_samples) / num_first
        seed_error = float(differences.std(ddof=1)) / math.sqrt(num_first)
        return Uncertainty(_shared(moved, rest), item_df, seed_error, num_first - 1)
    if 1 in (num_first, num_second):
        several, samples = (first, first_samples) if num_second == 1 else (second, second_samples)
        scale = 1 / num_first + 1 / num_second
        seed_error = float(several.std(ddof=1)) * math.sqrt(scale)
        return Uncertainty(_shared(moved, _rest(samples) * scale), item_df, seed_error, len(several) - 1)
    rest = _rest(first_samples) / num_first + _rest(second_samples) / num_second
    error, df = _welch(first, second)
    return Uncertainty(_shared(moved, rest), item_df, error, df)


def _welch(first: Floats, second: Floats) -> tuple[float, float]:
    """Standard error and degrees of freedom of a difference of means whose variances may differ (Welch 1947)."""
    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    total = sum(parts)
    if total == 0:
        return 0.0, float(min(len(first), len(second)) - 1)
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return math.sqrt(total), total**2 / below


def _rest(samples: Floats) -> float:
    """Variance over resamples, (N, seeds), of what one seed does and the others do not."""
    centred = samples - samples.mean(axis=1, keepdims=True)
    return float(centred.var(axis=0, ddof=1).sum()) / (samples.shape[1] - 1)


def _shared(moved: Floats, rest: float) -> float:
    """Standard error from items that all seeds share: what resampling moves, less what is in the seeds' spread."""
    return math.sqrt(max(0.0, float(moved.var(ddof=1)) - rest))
