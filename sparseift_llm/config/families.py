"""The families of Sparse-IFT with the options that each of them has: one class per family.

What a family builds is in the folder families/; here is only what a user may choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparseift_llm.config.parsing import check_choice, check_fields


@dataclass(frozen=True)
class Wide:
    """The same decoder with wider sides and sparse matrices between them.

    Args:
        scope: `model` widens hidden and FFN size by sqrt(1/(1-s)); `ffn` widens only the FFN's inner size, by
            1/(1-s), and leaves everything else as it was.
    """

    name: ClassVar[str] = "wide"
    scope: str = "model"

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("scope", self.scope, ("model", "ffn"))


@dataclass(frozen=True)
class Parallel:
    """A sum of sparse branches in place of a projection.

    Args:
        nonlinearity: in every branch: `layernorm`, or `none`: then the branches sum to one linear map.
    """

    name: ClassVar[str] = "parallel"
    nonlinearity: str = "layernorm"

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("nonlinearity", self.nonlinearity, ("layernorm", "none"))


@dataclass(frozen=True)
class Factorized:
    """Two sparse factors around a wider inner side, in place of a projection.

    Args:
        nonlinearity: between the factors: `none`, `layernorm` or `gelu`.
        sparse_u_only: the outer factor stays dense.
    """

    name: ClassVar[str] = "factorized"
    nonlinearity: str = "none"
    sparse_u_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("nonlinearity", self.nonlinearity, ("none", "layernorm", "gelu"))


@dataclass(frozen=True)
class Doped:
    """A sparse matrix plus a dense one of low rank, in place of a projection. It has no options."""

    name: ClassVar[str] = "doped"


FamilyOptions = Wide | Parallel | Factorized | Doped
