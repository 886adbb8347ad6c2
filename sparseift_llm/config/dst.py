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

    algorithm: Literal["static", "set", "rigl", "gmp"] = "rigl"
    """`static` (masks never change), `set` (grow at random), `rigl` (grow by the largest dense gradient of the global
    batch) or `gmp` (start dense, prune by magnitude)."""
    update_every_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between mask updates."""
    drop_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of a layer's active weights dropped at the first update; follows a cosine to 0. Not used by `static` and
    `gmp`."""
    stop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of all optimizer steps after which masks stay fixed."""
