"""Sparse Doped: y = V (U x) + W x + bias, V and U dense and of low rank, W sparse."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sparseift_llm import isoflop
from sparseift_llm.config.families import Doped
from sparseift_llm.families.base import DropInFamily, TrainedProjection
from sparseift_llm.families.trained_start import (
    Start,
    singular_factors,
    start_of_inputs,
    start_of_largest,
    start_of_outputs,
)
from sparseift_llm.layers.composite import CompositeProjection, MakePart, Part, make_parts, matrix_of, root_mean_square
from sparseift_llm.topology.masks import derive_seed


class DopedFamily(DropInFamily[Doped]):
    """W (out, in), U (rank, in) and V (out, rank) in place of a projection."""

    name = Doped.name

    def parts(self, shape: tuple[int, int], sparsity: float, tile: int, multiple: int) -> tuple[Part, ...]:
        outputs, inputs = shape
        target = isoflop.doped_rank(inputs, outputs, sparsity)

        def fits(rank: int) -> bool:
            return outputs * inputs - rank * (inputs + outputs) >= outputs * tile

        rank = isoflop.round_size(target, multiple, fits)
        return (
            Part("w", shape, outputs * inputs - rank * (inputs + outputs)),
            Part("u", (rank, inputs), rank * inputs, is_sparse=False, makes_outputs=False),
            Part("v", (outputs, rank), outputs * rank, is_sparse=False),
        )

    def start(self, trained: TrainedProjection, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
        """U and V from the truncated singular value decomposition of the weight, W from the largest of what is left."""
        weight, (w, u, v) = trained.weight, parts
        inner, outer = singular_factors(weight, u.shape[0])
        is_old = inner.any(1)
        return {
            w.name: start_of_largest(weight.to(inner) - outer @ inner, w, tile),
            u.name: start_of_inputs(inner, is_old, u, tile, derive_seed(seed, "u")),
            v.name: start_of_outputs(outer, is_old, v, tile, derive_seed(seed, "v")),
        }

    def build(self, dense: nn.Module, parts: tuple[Part, ...], make: MakePart, preserve: bool) -> CompositeProjection:
        return DopedProjection(dense, parts, make, preserve)


class DopedProjection(CompositeProjection):
    """y = V (U x) + W x + bias. Arguments as `DropInFamily.build`.

    With `preserve`, W and the product VU share the output variance in the ratio of their FLOPs.
    """

    def __init__(self, dense: nn.Module, parts: tuple[Part, ...], make: MakePart, preserve: bool) -> None:
        super().__init__(dense)
        w, _, v = parts
        std = dict.fromkeys("wuv", root_mean_square(dense))
        if preserve:
            size, rank = self.in_features * self.out_features, v.shape[1]
            share = 1 - w.num_active / size  # of the output variance that the low-rank part gives
            std |= {"u": 1 / math.sqrt(self.in_features), "v": std["v"] * math.sqrt(share * self.in_features / rank)}
        layers = make_parts(parts, std, make)
        self.w, self.u, self.v = layers["w"], layers["u"], layers["v"]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self._add_bias(self.v(self.u(input)) + self.w(input))

    def matrix(self) -> Tensor:
        return matrix_of(self.v) @ matrix_of(self.u) + matrix_of(self.w)
