"""Sparse Factorized: y = V g(U x) + bias around an inner side wider than a low rank, U and V sparse, or U alone."""

from __future__ import annotations

import math
from fractions import Fraction

from torch import Tensor, nn
from torch.nn import functional as F

from sparseift_llm import isoflop
from sparseift_llm.config.families import Factorized
from sparseift_llm.families.base import DropInFamily, TrainedProjection
from sparseift_llm.families.sparse_factors import pass_through
from sparseift_llm.families.trained_start import Start, singular_factors, start_of_inputs, start_of_outputs
from sparseift_llm.layers.composite import CompositeProjection, MakePart, Part, make_parts, matrix_of, root_mean_square
from sparseift_llm.topology.distributions import round_to_total
from sparseift_llm.topology.masks import derive_seed

# mean square of g(z) for normally distributed z of variance 1; of GELU (tanh formula) by numerical integration
_MEAN_SQUARE = {"none": 1.0, "layernorm": 1.0, "gelu": 0.4252}


class FactorizedFamily(DropInFamily[Factorized]):
    """The factors U (inner, in) and V (out, inner) in place of a projection."""

    name = Factorized.name

    def parts(self, shape: tuple[int, int], sparsity: float, tile: int, multiple: int) -> tuple[Part, ...]:
        (outputs, inputs), budget = shape, shape[0] * shape[1]
        sparse_u_only = self.options.sparse_u_only

        def fits(inner: int) -> bool:
            if not sparse_u_only:
                return inner * (inputs + outputs) >= budget
            return inner * tile <= budget - inner * outputs <= inner * inputs

        target = isoflop.factorized_inner(inputs, outputs, sparsity, sparse_u_only)
        inner = isoflop.round_size(target, multiple, fits)
        sizes = [inner * inputs // tile**2, inner * outputs // tile**2]
        units = budget // tile**2
        if sparse_u_only:
            counts = [units - sizes[1], sizes[1]]
        else:
            counts = round_to_total([Fraction(size * units, sum(sizes)) for size in sizes], sizes, units)
        return (
            Part("u", (inner, inputs), counts[0] * tile**2, makes_outputs=False),
            Part("v", (outputs, inner), counts[1] * tile**2, is_sparse=not sparse_u_only),
        )

    def num_norm_params(self, shape: tuple[int, int], parts: tuple[Part, ...]) -> int:
        return 2 * parts[0].shape[0] if self.options.nonlinearity == "layernorm" else 0

    def start(self, trained: TrainedProjection, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
        """U and V of a trained weight, by whichever of two ways comes nearer to it.

        One is the truncated singular value decomposition, singular values split evenly, of which the largest entries
        (or tiles) of each factor stay; inner units beyond the weight's rank are new: random in U, 0 in V. The other is
        `pass_through`, which comes nearer where few entries stay; not with n:m, as it does not choose within groups.
        """
        weight, (u, v) = trained.weight, parts
        inner, outer = singular_factors(weight, u.shape[0])
        is_old = inner.any(1)
        ways = [
            (
                start_of_inputs(inner, is_old, u, tile, derive_seed(seed, "u")),
                start_of_outputs(outer, is_old, v, tile, derive_seed(seed, "v")),
            )
        ]
        passing = None if u.pattern else pass_through(weight.to(inner), u, v, tile, seed)
        ways += [passing] if passing else []
        best = min(ways, key=lambda way: float((weight - way[1].values @ way[0].values).square().sum()))
        return {u.name: best[0], v.name: best[1]}

    def build(self, dense: nn.Module, parts: tuple[Part, ...], make: MakePart, preserve: bool) -> CompositeProjection:
        return FactorizedProjection(dense, self.options, parts, make, preserve)


class FactorizedProjection(CompositeProjection):
    """y = V g(U x) + bias. Arguments as `DropInFamily.build`; `options` say which g."""

    def __init__(
        self, dense: nn.Module, options: Factorized, parts: tuple[Part, ...], make: MakePart, preserve: bool
    ) -> None:
        super().__init__(dense)
        self.nonlinearity = options.nonlinearity
        u, v = parts
        std = {"u": root_mean_square(dense), "v": root_mean_square(dense)}
        if preserve:
            inner = u.shape[0]
            gain = self.in_features * self.out_features / (v.num_active * _MEAN_SQUARE[self.nonlinearity])
            std = {"u": math.sqrt(inner / u.num_active), "v": std["v"] * math.sqrt(gain)}
        layers = make_parts(parts, std, make)
        self.u, self.v = layers["u"], layers["v"]
        weight: Tensor = dense.weight  # type: ignore[assignment]
        has_norm = self.nonlinearity == "layernorm"
        self.norm = nn.LayerNorm(u.shape[0], device=weight.device, dtype=weight.dtype) if has_norm else None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        inner = self.u(input)
        if self.norm is not None:
            inner = self.norm(inner)
        elif self.nonlinearity == "gelu":
            inner = F.gelu(inner, approximate="tanh")
        return self._add_bias(self.v(inner))

    def matrix(self) -> Tensor:
        if self.nonlinearity != "none":
            raise ValueError(
                f"Factorized with nonlinearity={self.nonlinearity!r} is not a linear map, so there is no stock model "
                "of equal logits; keep the sparse model, or train with nonlinearity='none'"
            )
        return matrix_of(self.v) @ matrix_of(self.u)
