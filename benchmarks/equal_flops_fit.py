"""How the gain of a wide residual stream moves with width and training tokens, and what that predicts elsewhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from equal_flops_rows import BY_NAME, Size, tokens_per_weight
from equal_flops_table import Best, best_of, gain
from numpy.typing import NDArray
from scipy import stats

from sparseift_llm.utils.tables import markdown_table

OURS = "residual2"
LENGTHS = ("-quarter", "-half", "", "-double")  # ends of the rows' names
CENTRE = (128.0, 10.0)  # where the logarithms of width and of tokens for each weight are 0
# GPT-3 Small, 125M parameters, with about as many tokens as Sparse-IFT's paper trained it on (2.5B).
TARGET = (768.0, 30.0)


@dataclass(frozen=True)
class Point:
    """The dense model and the wide one, both at their best rates, at one width and length of training.

    Args:
        width: of the dense model.
        tokens: training tokens for each projection weight.
    """

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
    def place(self) -> tuple[float, float]:
        """Width and tokens for each weight."""
        return self.width, self.tokens


@dataclass(frozen=True)
class Plane:
    """gain = c0 + c1 log2(width / 128) + c2 log2(tokens for each weight / 10), by weighted least squares.

    Args:
        coefficients: c0 to c2.
        covariance: [3, 3], of the coefficients.
        t: half of a 95% interval, in standard errors.
    """

    coefficients: NDArray[np.float64]
    covariance: NDArray[np.float64]
    t: float

    def interval(self, direction: NDArray[np.float64]) -> tuple[float, float, float]:
        """The coefficients' sum weighted by `direction`, and the ends of its 95% interval."""
        value = float(direction @ self.coefficients)
        half = self.t * math.sqrt(direction @ self.covariance @ direction)
        return value, value - half, value + half


def points_of(folder: Path) -> list[Point]:
    """All of one corpus whose models have two layers: `folder` has a folder for each size."""
    found = []
    for size in sorted(Size.from_name(path.name) for path in folder.glob("width*")):
        for length in LENGTHS:
            dense, ours = (best_of(folder / str(size) / f"{row}{length}") for row in ("dense", OURS))
            if size == Size(size.width) and dense and ours:
                tokens = tokens_per_weight(size, BY_NAME[f"{OURS}{length}"])
                found.append(Point(size.width, tokens, dense, ours))
    return found


def seed_variance(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """Variance of a loss among seeds, pooled over groups, and its degrees of freedom; None if all have one seed."""
    repeated = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    if freedom == 0:
        return None
    return sum((len(group) - 1) * statistics.variance(group) for group in repeated) / freedom, freedom


def direction(width: float, tokens: float) -> NDArray[np.float64]:
    """[3]: what the coefficients are multiplied with at this place."""
    return np.array([1.0, math.log2(width / CENTRE[0]), math.log2(tokens / CENTRE[1])])


def fit_plane(points: Sequence[Point]) -> Plane | None:
    """Through all points, each weighted by its number of seeds; None if they do not determine a plane.

    The errors of the coefficients come from the variance among seeds, pooled over all rows of all points, so that a
    point with one seed counts, too. They do not contain that the truth may not be a plane.
    """
    variance = seed_variance(list(row.losses.values()) for point in points for row in (point.dense, point.ours))
    places = np.array([direction(*point.place) for point in points])
    if variance is None or np.linalg.matrix_rank(places) < places.shape[1]:
        return None
    weights = np.array([1 / point.variance_factor for point in points])
    inverse = np.linalg.inv(places.T @ (weights[:, None] * places))
    coefficients = inverse @ (places.T @ (weights * np.array([point.gain for point in points])))
    return Plane(coefficients, variance[0] * inverse, float(stats.t.ppf(0.975, variance[1])))


def report(results: Path) -> str:
    """Markdown: for every corpus with a plane, its points, what a doubling adds, and the gain at `TARGET`."""
    return "\n\n".join(
        f"{folder.name}: gain of a residual stream twice as wide, by width and tokens\n\n{points_table(points)}\n\n"
        f"{fitted(plane)}"
        for folder in sorted(results.iterdir())
        if folder.is_dir() and (points := points_of(folder)) and (plane := fit_plane(points))
    )


def points_table(points: Iterable[Point]) -> str:
    """One line each."""
    lines = [
        (
            point.width,
            f"{point.tokens:.0f}",
            gain(point.ours, point.dense),
            f"{len(point.dense.losses)}, {len(point.ours.losses)}",
        )
        for point in points
    ]
    return markdown_table(("width", "tokens for each weight", "gain (95%)", "seeds: dense, wide"), lines, "rrlr")


def fitted(plane: Plane) -> str:
    """What the plane says, in words."""

    def words(of: NDArray[np.float64]) -> str:
        value, low, high = plane.interval(of)
        return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"

    wider, longer = np.eye(3)[1:]
    return (
        f"A plane through these gains, over the logarithms: twice the width adds {words(wider)} nats, twice the tokens "
        f"{words(longer)}. At width {TARGET[0]:.0f} and {TARGET[1]:.0f} tokens for each weight it predicts "
        f"{words(direction(*TARGET))}."
    )
