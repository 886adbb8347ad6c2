"""How the gain of a sparse row moves with width and training tokens, and what that predicts elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from equal_flops_rows import BY_NAME, Baseline, tokens_per_weight
from equal_flops_table import Best, best_of, gain
from numpy.typing import NDArray
from scipy import stats

from sparseift_llm.utils.tables import markdown_table

FITTED = ("residual2", "ffn2")
LENGTHS = ("-quarter", "-half", "", "-double")  # ends of the rows' names
CENTRE = (128.0, 10.0)  # where the logarithms of width and of tokens for each weight are 0
# GPT-3 Small, 125M parameters, with about as many tokens as Sparse-IFT's paper trained it on (2.5B).
TARGET = (768.0, 30.0)


@dataclass(frozen=True)
class Point:
    """The dense model and the sparse one, both at their best rates, at one width and length of training.

    Args:
        corpus: what both train on.
        width: of the dense model.
        tokens: training tokens for each projection weight.
    """

    corpus: str
    width: int
    tokens: float
    dense: Best
    ours: Best

    @property
    def gain(self) -> float:
        """Nats that ours is better by."""
        return self.dense.mean - self.ours.mean

    @property
    def variance_factor(self) -> float:
        """Variance of `gain`, in units of the variance of one seed's loss."""
        return 1 / len(self.dense.losses) + 1 / len(self.ours.losses)

    @property
    def place(self) -> tuple[str, float, float]:
        """Corpus, width, and tokens for each weight."""
        return self.corpus, self.width, self.tokens


@dataclass(frozen=True)
class Plane:
    """gain = c[corpus] + a log2(width / 128) + b log2(tokens for each weight / 10), by weighted least squares.

    Args:
        corpora: the K corpora.
        coefficients: [K + 2], the constants of the corpora, a and b.
        covariance: [K + 2, K + 2], of the coefficients.
        t: half of a 95% interval, in standard errors.
    """

    corpora: tuple[str, ...]
    coefficients: NDArray[np.float64]
    covariance: NDArray[np.float64]
    t: float

    def at(self, corpus: str, width: float, tokens: float) -> tuple[float, float, float]:
        """The gain at a place, and the ends of its 95% interval."""
        return self.interval(direction(self.corpora, corpus, width, tokens))

    def interval(self, direction: NDArray[np.float64]) -> tuple[float, float, float]:
        """The coefficients' sum weighted by `direction`, and the ends of its 95% interval."""
        value = float(direction @ self.coefficients)
        half = self.t * math.sqrt(direction @ self.covariance @ direction)
        return value, value - half, value + half


def points_of(folder: Path, row: str) -> list[Point]:
    """All of `row` on one corpus whose models have two layers.

    Args:
        folder: named as the corpus, has a folder for each size.
        row: a sparse one, whose dense twins of the same lengths have results there, too.
    """
    found = []
    for baseline in sorted(Baseline.from_name(path.name) for path in folder.glob("width*")):
        for length in LENGTHS:
            dense, ours = (best_of(folder / str(baseline) / f"{name}{length}") for name in ("dense", row))
            if baseline == Baseline(baseline.width) and dense and ours:
                tokens = tokens_per_weight(baseline, BY_NAME[f"{row}{length}"])
                found.append(Point(folder.name, baseline.width, tokens, dense, ours))
    return found


def seed_variance(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """Variance of a loss among seeds, pooled over groups, and its degrees of freedom; None if all have one seed."""
    repeated = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom == 0:
        return None
    return sum((len(group) - 1) * statistics.variance(group) for group in repeated) / freedom, freedom


def direction(corpora: Sequence[str], corpus: str, width: float, tokens: float) -> NDArray[np.float64]:
    """[K + 2]: what the coefficients are multiplied with at this place."""
    constants = [float(corpus == other) for other in corpora]
    return np.array([*constants, math.log2(width / CENTRE[0]), math.log2(tokens / CENTRE[1])])


def fit_plane(points: Sequence[Point]) -> Plane | None:
    """Through all points, each weighted by its number of seeds; None if they do not determine a plane.

    The errors of the coefficients come from the variance among seeds, pooled over all rows of all points, so that a
    point with one seed counts, too. They do not contain that the truth may not be a plane.
    """
    variance = seed_variance(list(row.losses.values()) for point in points for row in (point.dense, point.ours))
    corpora = tuple(dict.fromkeys(point.corpus for point in points))
    places = np.array([direction(corpora, *point.place) for point in points])
    if variance is None or np.linalg.matrix_rank(places) < places.shape[1]:
        return None
    weights = np.array([1 / point.variance_factor for point in points])
    inverse = np.linalg.inv(places.T @ (weights[:, None] * places))
    coefficients = inverse @ (places.T @ (weights * np.array([point.gain for point in points])))
    return Plane(corpora, coefficients, variance[0] * inverse, float(stats.t.ppf(0.975, variance[1])))


def report(results: Path) -> str:
    """Markdown: for each of the rows in `FITTED`, see `report_of`."""
    return "\n\n".join(part for row in FITTED if (part := report_of(results, row)))


def report_of(results: Path, row: str) -> str:
    """Markdown: all points of corpora with at least two, and what is fitted to them, if they determine a plane.

    Empty if no corpus has two points.
    """
    found = [points_of(folder, row) for folder in sorted(results.iterdir()) if folder.is_dir()]
    points = [point for points in found if len(points) > 1 for point in points]
    if not points:
        return ""
    plane = fit_plane(points)
    parts = [f"Gain of {BY_NAME[row].title}, by corpus, width and tokens", points_table(points)]
    return "\n\n".join([*parts, fitted(plane)] if plane else parts)


def points_table(points: Iterable[Point]) -> str:
    """One line each."""
    lines = [
        (
            point.corpus,
            point.width,
            f"{point.tokens:.0f}",
            gain(point.ours, point.dense),
            f"{len(point.dense.losses)}, {len(point.ours.losses)}",
        )
        for point in points
    ]
    return markdown_table(
        ("corpus", "width", "tokens for each weight", "gain (95%)", "seeds: dense, sparse"), lines, "lrrlr"
    )


def fitted(plane: Plane) -> str:
    """What the plane says, in words."""
    wider, longer = (in_words(plane.interval(of)) for of in np.eye(len(plane.corpora) + 2)[-2:])
    there = [f"{in_words(plane.at(corpus, *TARGET))} for {corpus}" for corpus in plane.corpora]
    place = f"width {TARGET[0]:.0f} and {TARGET[1]:.0f} tokens for each weight"
    return (
        "A plane through these gains, over the logarithms, with a constant for each corpus: twice the width adds "
        f"{wider} nats, twice the tokens {longer}. At {place} it predicts {' and '.join(there)}."
    )


def in_words(interval: tuple[float, float, float]) -> str:
    """A value and its 95% interval."""
    value, low, high = interval
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
