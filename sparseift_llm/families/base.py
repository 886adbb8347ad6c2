"""What every family offers: `Family`, and `DropInFamily` for those that put a module in the place of a projection.

The families themselves are in a file each, and know nothing of each other; registry.py finds them by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from sparseift_llm import isoflop
from sparseift_llm.config.families import FamilyOptions
from sparseift_llm.config.structures import misfit
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.families.trained_start import Start
from sparseift_llm.layers.composite import CompositeProjection, MakePart, Part
from sparseift_llm.models.architectures import sizes_of, with_sizes

Options = TypeVar("Options", bound=FamilyOptions)


@dataclass(frozen=True)
class TrainedProjection:
    """A trained dense projection, from which a sparse model may start.

    Args:
        weight: (out, in).
        kind: what it computes, e.g. `mlp_in`; fused kinds are joined, e.g. `qkv`.
        num_units: hidden units of the FFN in the dense and in the sparse model.
    """

    weight: Tensor
    kind: str
    num_units: tuple[int, int]


class Family(ABC, Generic[Options]):
    """One way to make a dense model sparse at the same number of multiply-adds.

    Wide changes the widths of the whole model, and keeps one matrix per projection. The other families change no
    width; see `DropInFamily`.

    Args:
        options: the user's choices, an object of the family's own class in config/families.py.

    Attributes:
        name: how recipes and configs call the family.
    """

    name: ClassVar[str]

    def __init__(self, options: Options) -> None:
        self.options = options

    def sparse_config(self, dense: PreTrainedConfig, config: SparseIFTConfig) -> PreTrainedConfig:
        """The transformers config of the sparse model: a new one, with the dense widths unless the family changes them.

        Args:
            dense: config of the dense model.
            config: gives `sparsity`, `width_multiple`, `block_size` and the projections that become sparse.
        """
        sizes = sizes_of(dense)
        return with_sizes(dense, sizes.hidden, sizes.ffn, sizes.head_dim)

    @abstractmethod
    def start(self, trained: TrainedProjection, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
        """The matrices in place of a trained projection, by name of the part.

        Args:
            trained: the dense projection.
            parts: the matrices that take its place.
            tile: side of a tile, 1 for single weights.
            seed: of whatever is random.

        Returns:
            A start for every part; none at all where the projection is to be copied as it is.
        """


class DropInFamily(Family[Options]):
    """A family that puts several matrices in the place of a projection, with its sides and its multiply-adds."""

    @abstractmethod
    def parts(self, shape: tuple[int, int], sparsity: float, tile: int, multiple: int) -> tuple[Part, ...]:
        """The matrices in place of a projection, which together have as many multiply-adds as it.

        Sizes are rounded first, then the sparsity is solved again (arXiv 2303.11525, section 3.2).

        Args:
            shape: sides (out, in) of the projection.
            sparsity: zero fraction in (0, 1) that sets the sizes.
            tile: side of a tile, 1 for single weights.
            multiple: what inner sides are rounded to a multiple of.

        Raises:
            ValueError: no sizes meet the multiply-adds.
        """

    def num_norm_params(self, shape: tuple[int, int], parts: tuple[Part, ...]) -> int:
        """Number of parameters of the non-linearities in place of a projection of `shape` (out, in)."""
        return 0

    @abstractmethod
    def build(self, dense: nn.Module, parts: tuple[Part, ...], make: MakePart, preserve: bool) -> CompositeProjection:
        """The module in place of a projection, freshly initialised. Its `to_dense` gives the stock layer back.

        Args:
            dense: the `Linear` or `Conv1D` to replace.
            parts: as `parts` gives them.
            make: builds the layer of one part.
            preserve: start with about the output variance of `dense` (for inputs of variance 1, as after a norm).
        """

    def checked_parts(
        self, name: str, shape: tuple[int, int], sparsity: float, config: SparseIFTConfig
    ) -> tuple[Part, ...]:
        """`parts` in the tiles and multiples of `config`, for the projection `name`.

        Raises:
            ValueError: sides are not multiples of the tile, no sizes meet the multiply-adds, or outputs would be left
                without any input; the message begins with `name`.
        """
        tile = config.block_size or 1
        for side in shape:
            if side % tile:
                raise ValueError(
                    f"{name} is {shape[0]} x {shape[1]}, and {side} is not a multiple of block_size={tile}; choose a "
                    "block_size that divides it, or leave it dense with exclude"
                )
        try:
            parts = self.parts(shape, sparsity, tile, math.lcm(config.width_multiple, config.side_multiple))
        except ValueError as error:
            raise ValueError(f"{name}, family={self.name!r}: {error}") from error
        if config.pattern is not None:
            parts = tuple(_with_pattern(part, name, config.pattern, config.transposable) for part in parts)
        for part in parts:
            if part.is_sparse and part.num_active < part.shape[0] * tile:
                raise ValueError(
                    f"{name}, family={self.name!r}: {part.num_active // tile**2:,} active weights or tiles for "
                    f"{part.shape[0] // tile:,} rows would leave outputs without any input; lower sparsity={sparsity} "
                    "or block_size"
                )
        return parts


def _with_pattern(part: Part, name: str, pattern: tuple[int, int], transposable: bool) -> Part:
    """A part of the projection `name` with the number of active weights that n:m gives it, if it is sparse.

    Raises:
        ValueError: m does not divide its inputs, or its outputs where masks are transposable.
    """
    if not part.is_sparse:
        return part
    (n, m), side = pattern, misfit(part.shape, pattern, transposable)
    if side is not None:
        raise ValueError(
            f"{name}: {part.name} has {side}, and structure='{n}:{m}' needs a multiple of {m}; use another n:m, or "
            "leave it dense with exclude"
        )
    num_active = isoflop.pattern_active(part.num_weights, pattern)
    return replace(part, num_active=num_active, pattern=pattern, transposable=transposable)
