"""The families of Sparse-IFT with the options that each of them has: one class per family.

What a family builds is in the folder families/; here is only what a user may choose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from sparseift_llm.config.parsing import config_class


class _Named:
    """Options are equal to the name of their family, so that `config.family == "wide"` holds for any scope.

    Configs held the name alone once. Two objects of options are equal if all their options are.
    """

    name: str

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.name == other
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


@config_class
class Wide(_Named):
    """The same decoder with wider sides, and sparse matrices between them."""

    name: Literal["wide"] = field(default="wide", kw_only=True)
    """The name of the family."""
    scope: Literal["model", "ffn", "residual"] = "model"
    """`model` widens hidden and FFN size by sqrt(1/(1-s)); `ffn` widens only the FFN's inner size, by 1/(1-s), and
    leaves everything else as it was; `residual` widens only the hidden size, by 1/(1-s), and leaves attention and the
    FFN's inner size as they were."""
    embedding: Literal["sparse", "unstructured", "dense"] = "sparse"
    """With scope `residual`: `sparse` (embedding and logits have as many active weights as in the dense model, every
    word as many as another; with structure `block` in tiles, and then to a tile), `unstructured` (single weights, with
    structure `block` only) or `dense` (all are active; with accounting `whole_model` the projections pay for the
    logits)."""
    embedding_updates: bool = False
    """With scope `residual`: mask updates change the masks of sparse embeddings and logits, too. `rigl` takes a dense
    gradient of vocabulary times hidden size for that."""
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """With init `pretrained` and scope `ffn` or `residual`: the share of every matrix's active weights that goes to new
    units or channels. What it takes is the smallest trained weights; with 0, nothing new is connected."""


@config_class
class Parallel(_Named):
    """In place of a projection, a sum of sparse branches."""

    name: Literal["parallel"] = field(default="parallel", kw_only=True)
    """The name of the family."""
    nonlinearity: Literal["layernorm", "none"] = "layernorm"
    """What follows each branch; with `none` the branches sum to one linear map."""


@config_class
class Factorized(_Named):
    """In place of a projection, two sparse factors around a wider inner side."""

    name: Literal["factorized"] = field(default="factorized", kw_only=True)
    """The name of the family."""
    nonlinearity: Literal["none", "layernorm", "gelu"] = "none"
    """What stands between the factors."""
    sparse_u_only: bool = False
    """The outer factor stays dense."""


@config_class
class Doped(_Named):
    """In place of a projection, a sparse matrix plus a dense one of low rank."""

    name: Literal["doped"] = field(default="doped", kw_only=True)
    """The name of the family."""


@config_class
class Dense(_Named):
    """Projections stay as they are; for rules only."""

    name: Literal["dense"] = field(default="dense", kw_only=True)
    """The name of the family."""


Family = Annotated[Wide | Parallel | Factorized | Doped, Field(discriminator="name")]
RuleFamily = Annotated[Parallel | Factorized | Doped | Dense, Field(discriminator="name")]
FamilyOptions = Wide | Parallel | Factorized | Doped | Dense
_CLASSES: dict[str, Any] = {
    "wide": Wide,
    "parallel": Parallel,
    "factorized": Factorized,
    "doped": Doped,
    "dense": Dense,
}
# What older files say of families that do not have an option; None where none says anything.
_BESIDE = {
    "scope": "model",
    "nonlinearity": None,
    "sparse_u_only": False,
    "embedding": None,
    "embedding_updates": None,
    "reserve": None,
}


def with_family_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a config in which everything about the family is one value under `family`.

    Takes what configs had before families had classes: the name of the family, and `scope`, `nonlinearity` and
    `sparse_u_only` beside it. Older files write all three for every family; those that say nothing are left out.
    A family of another type or an unknown name is passed on, to be refused where all names are known.

    Raises:
        ValueError: an option of another family, or one that is given twice.
    """
    values = dict(values)
    beside = {key: values.pop(key) for key in _BESIDE if key in values}
    if "family" not in values and not beside:
        return values
    family = values.get("family", "wide")
    if isinstance(family, FamilyOptions):  # the options beside it replace its own, as `dataclasses.replace` has it
        options = {**dataclasses.asdict(family), **_own_options(family.name, beside)}
    elif isinstance(family, Mapping):
        for key in beside.keys() & family.keys():
            raise ValueError(f"{key} is given twice, in family and beside it; leave one of them out")
        options = {**family, **_own_options(family.get("name"), beside)}
    elif isinstance(family, str):
        options = {"name": family, **_own_options(family, beside)}
    else:
        options = family
    return {**values, "family": options}


def _own_options(name: Any, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options beside a family's name that the family has."""
    if not isinstance(name, str) or name not in _CLASSES:
        return {}
    options: dict[str, Any] = {}
    for key, value in beside.items():
        if hasattr(_CLASSES[name], key):
            options |= {key: value} if (key, value) != ("nonlinearity", None) else {}
        elif value != _BESIDE[key]:
            owners = [repr(owner) for owner, cls in _CLASSES.items() if hasattr(cls, key)]
            raise ValueError(
                f"{key}={value!r} goes with family={' or '.join(owners)} only, not with family={name!r}; leave it out"
            )
    return options
