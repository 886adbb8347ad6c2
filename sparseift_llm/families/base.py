"""Which projections another family than Wide replaces, by what, and the module itself."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

from torch import Tensor, nn

from sparseift_llm.config.transform import FamilyRule, SparseIFTConfig
from sparseift_llm.families import doped, factorized, parallel
from sparseift_llm.families.trained_start import Start
from sparseift_llm.layers.composite import CompositeProjection, MakePart, Part

_FAMILIES: dict[str, tuple[ModuleType, type]] = {
    "parallel": (parallel, parallel.ParallelProjection),
    "factorized": (factorized, factorized.FactorizedProjection),
    "doped": (doped, doped.DopedProjection),
}


def rule_for(config: SparseIFTConfig, name: str, kinds: tuple[str, ...], layer_index: int) -> FamilyRule | None:
    """What becomes of a projection: a drop-in family, `dense`, or None where it is Wide's or not chosen.

    Args:
        config: the transformation.
        name: of the projection, for errors.
        kinds: what it computes.
        layer_index: of its decoder layer.

    Raises:
        ValueError: a rule covers some of the kinds that are fused in one matrix, but not all.
    """
    rules = [*config.rules]
    if config.family != "wide":
        rules.append(
            FamilyRule(
                config.family,
                config.target_kinds,
                nonlinearity=config.nonlinearity,
                sparse_u_only=config.sparse_u_only,
            )
        )
    for rule in rules:
        covered = [rule.covers(kind, layer_index) and kind not in config.exclude for kind in kinds]
        if any(covered) and not all(covered):
            raise ValueError(
                f"{name} holds {', '.join(kinds)} in one matrix, so they are sparse together or not at all; name all "
                "of them in targets/exclude"
            )
        if all(covered):
            return dataclasses.replace(rule, sparsity=rule.sparsity or config.sparsity)
    return None


def parts_of(rule: FamilyRule, name: str, shape: tuple[int, int], config: SparseIFTConfig) -> tuple[Part, ...]:
    """The matrices in place of a projection of `shape` (out, in).

    Raises:
        ValueError: sides are no multiples of the tile, or no sizes meet the FLOPs; the message begins with `name`.
    """
    tile = config.block_size or 1
    for side in shape:
        if side % tile:
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]}, and {side} is not a multiple of block_size={tile}; choose a "
                "block_size that divides it, or leave it dense with exclude"
            )
    try:
        parts: tuple[Part, ...] = _FAMILIES[rule.family][0].parts(
            shape, rule, tile, math.lcm(config.width_multiple, tile)
        )
    except ValueError as error:
        raise ValueError(f"{name}, family={rule.family!r}: {error}") from error
    for part in parts:
        if part.is_sparse and part.num_active < part.shape[0] * tile:
            raise ValueError(
                f"{name}, family={rule.family!r}: {part.num_active // tile**2:,} active weights or tiles for "
                f"{part.shape[0] // tile:,} rows would leave outputs without any input; lower sparsity={rule.sparsity} "
                "or block_size"
            )
    return parts


def num_norm_params(rule: FamilyRule, shape: tuple[int, int], parts: tuple[Part, ...]) -> int:
    """Parameters of the non-linearities in place of a projection of `shape`."""
    return int(_FAMILIES[rule.family][0].num_norm_params(shape, rule, parts))


def build(
    dense: nn.Module, rule: FamilyRule, parts: tuple[Part, ...], make: MakePart, preserve: bool
) -> CompositeProjection:
    """The module in place of `dense`, freshly initialised; arguments as `ParallelProjection`."""
    module: CompositeProjection = _FAMILIES[rule.family][1](dense, rule, parts, make, preserve)
    return module


def start(weight: Tensor, rule: FamilyRule, parts: tuple[Part, ...], tile: int, seed: int) -> dict[str, Start]:
    """The matrices in place of a trained weight (out, in), by name of the part; arguments as `parallel.start`."""
    starts: dict[str, Start] = _FAMILIES[rule.family][0].start(weight, parts, tile, seed)
    return starts
