"""How masks change during training: `DSTConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparseift_llm.config.parsing import config_class


@config_class
class DSTConfig:
    """How masks change during training (dynamic sparse training).

    Raises:
        ValueError: a value outside its range, naming it.

    Source: RigL, arXiv 1911.11134, eq. 1; GMP, arXiv 1710.01878.
    """

    algorithm: Literal["static", "set", "rigl", "gmp", "granet"] = "rigl"
    """`static` (masks never change), `set` (grow at random), `rigl` (grow by the largest dense gradient of the global
    batch), `gmp` (start dense, prune by magnitude) or `granet` (prune as `gmp` and exchange as `rigl`)."""
    update_every_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between mask updates."""
    drop_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of a layer's active weights dropped at the first update; later ones follow `drop_schedule`. Not used by
    `static` and `gmp`."""
    stop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of all optimizer steps after which masks stay fixed."""
    drop_schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    """How the share falls until masks are final: along a `cosine` to 0, not at all (`constant`), or by the same factor
    at each step to a hundredth (`exponential`)."""
    drop_by: Literal["magnitude", "saliency"] = "magnitude"
    """What is dropped: the smallest |w|, or the smallest |w| times the root mean square of its gradient, which Adam
    accumulates in its state. Of tiles the sum over all weights."""
    soft_growth: bool = False
    """`rigl` and `granet`: grow at random, in proportion to the gradient's magnitude, instead of the largest."""
    start_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """`gmp` and `granet`: share of all optimizer steps before pruning begins."""
    keep_connected: bool | None = None
    """No input is left that nothing reads, and no output without an input: first masks have no empty row or column
    where the numbers allow it, updates do not drop the last entry of one, and nothing is grown for a gradient of 0.
    Null: with tiles, but not with single weights, whose masks are the reference's. Not for `gmp` and `granet`."""
    grown_state: Literal["zero", "row_mean", "own_count"] = "zero"
    """How grown weights begin under Adam, whose step count is old: with a state of 0 (`zero`, the reference's rule),
    with the mean second moment of their output row (`row_mean`), or with a step count of their own (`own_count`, which
    stores a number per weight). The last two are for torch's Adam and AdamW."""
    grown_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """With `own_count`: steps over which the rate of a grown weight rises to the full one."""

    @property
    def starts_dense(self) -> bool:
        """Whether all weights are active at first."""
        return self.algorithm in ("gmp", "granet")

    @property
    def grows(self) -> bool:
        """Whether updates make inactive weights active."""
        return self.algorithm not in ("static", "gmp")

    def keeps_connected(self, structure: str) -> bool:
        """Whether `keep_connected` holds for matrices of `structure`."""
        return structure == "block" if self.keep_connected is None else self.keep_connected

    def __post_init__(self) -> None:
        if self.keep_connected and self.starts_dense:
            raise ValueError(
                f"algorithm={self.algorithm!r} prunes the smallest weights wherever they are, so keep_connected cannot "
                "hold; use static, set or rigl, or leave it out"
            )
        if self.grown_warmup_steps and self.grown_state != "own_count":
            raise ValueError(
                f"grown_warmup_steps={self.grown_warmup_steps} needs grown_state='own_count'; set it, or leave the "
                "warmup out"
            )
        if self.soft_growth and self.algorithm not in ("rigl", "granet"):
            raise ValueError(
                f"algorithm={self.algorithm!r} has no growth scores for soft_growth; leave it out, or use rigl"
            )
        if self.start_fraction and not self.starts_dense:
            raise ValueError(
                f"algorithm={self.algorithm!r} does not prune, so start_fraction would be ignored; leave it out, or "
                "use gmp or granet"
            )
        if self.start_fraction >= self.stop_fraction:
            raise ValueError(
                f"start_fraction={self.start_fraction} must be below stop_fraction={self.stop_fraction}, where masks "
                "are final"
            )
        if self.grown_state != "zero" and not self.grows:
            raise ValueError(f"algorithm={self.algorithm!r} grows nothing; leave grown_state out, or use set or rigl")
