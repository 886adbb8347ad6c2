"""Which class implements a family, and which family a projection gets. The only file that knows all families."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from sparseift_llm.config.families import Dense, FamilyOptions
from sparseift_llm.config.parsing import from_dict
from sparseift_llm.config.rules import FamilyRule
from sparseift_llm.config.transform import SparseIFTConfig
from sparseift_llm.families.base import DropInFamily, Family
from sparseift_llm.families.doped import DopedFamily
from sparseift_llm.families.factorized import FactorizedFamily
from sparseift_llm.families.parallel import ParallelFamily
from sparseift_llm.families.wide import WideFamily
from sparseift_llm.utils.words import check_choice

FAMILIES: dict[str, type[Family[Any]]] = {
    family.name: family for family in (WideFamily, ParallelFamily, FactorizedFamily, DopedFamily)
}


def family_of(options: FamilyOptions) -> Family[Any]:
    """The family that `options` belong to, under these options."""
    return FAMILIES[options.name](options)


def drop_in_of(rule: FamilyRule) -> DropInFamily[Any]:
    """The family that a rule puts in the place of projections.

    Raises:
        ValueError: the rule leaves them dense.
    """
    if isinstance(rule.family, Dense):
        raise ValueError(f"family={rule.family.name!r} puts nothing in the place of a projection")
    family = family_of(rule.family)
    assert isinstance(family, DropInFamily), "rules have no other families"
    return family


def drop_in_with(name: str, options: Mapping[str, Any]) -> DropInFamily[Any]:
    """The drop-in family `name` under the options of a model's record; those that are absent have their defaults.

    Raises:
        ValueError: a family that puts nothing in the place of a projection, or an option or value it does not know.
    """
    check_choice("family", name, tuple(key for key, family in FAMILIES.items() if issubclass(family, DropInFamily)))
    options_class = next(cls for cls in typing.get_args(FamilyOptions) if cls.name == name)
    family = FAMILIES[name](from_dict(options_class, options, "options"))
    assert isinstance(family, DropInFamily)
    return family


def rule_for(config: SparseIFTConfig, name: str, kinds: tuple[str, ...], layer_index: int) -> FamilyRule | None:
    """What becomes of a projection: a drop-in family, `dense`, or None where it is left to Wide or not chosen.

    Args:
        config: the transformation.
        name: of the projection, for errors.
        kinds: what it computes.
        layer_index: of its decoder layer.

    Raises:
        ValueError: a rule covers some of the kinds that are fused in one matrix, but not all.
    """
    for rule in config.all_rules:
        covered = [rule.covers(kind, layer_index) and kind not in config.exclude for kind in kinds]
        if any(covered) and not all(covered):
            raise ValueError(
                f"{name} holds {', '.join(kinds)} in one matrix, so they are sparse together or not at all; name all "
                "of them in targets/exclude"
            )
        if all(covered):
            return dataclasses.replace(rule, sparsity=rule.sparsity or config.sparsity)
    return None
